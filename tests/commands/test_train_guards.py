"""`vsrplug train` on a clip with a NaN: one line, an exit code, and files to go on from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from vsrplug.data import DemoClips


class Poisoned:
    """A clip whose fourth frame has one value that is none."""

    name = "poisoned"

    def __init__(self) -> None:
        self.pixels = DemoClips(clips=1, size=(64, 64), frames=8)[0].pixels.float() / 255
        self.pixels[3] = float("nan")

    def __len__(self) -> int:
        return len(self.pixels)


def test_a_poisoned_clip_ends_in_one_line_that_names_it_and_leaves_a_checkpoint(
    vsrplug: Callable[..., None],
    tmp_path: Path,
    tiny: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = ModuleType("poisoned_clips")
    ours.clips = lambda: [*DemoClips(clips=3, size=(64, 64), frames=8), Poisoned()]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "poisoned_clips", ours)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "poisoned.yaml").write_text("_target_: poisoned_clips.clips\n")
    overrides = [text for text in tiny["train"] if not text.startswith("data.")]
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        vsrplug(
            "train", "--config-dir", str(tmp_path), *overrides, "data=poisoned", "plugins=memory_bank",
            "trainer.max_steps=50", f"hydra.run.dir={run}",
        )  # fmt: skip
    message = str(caught.value)
    assert message.startswith("vsrplug train: step ")
    assert "\n" not in message
    step = int(message.split()[3].rstrip(":"))
    state, batch = run / "checkpoints" / "last_finite.ckpt", run / "checkpoints" / "not_finite.safetensors"
    assert message.endswith(
        f"NaN or Inf in the input, clip 'poisoned' (hr, lr); the state before that step is in {state}, the batch in "
        f"{batch}. Mend that clip or leave it out"
    )
    assert "Traceback" not in capsys.readouterr().err
    assert torch.load(state, weights_only=True)["global_step"] == step
    assert load_file(batch)["hr"].isnan().any()
