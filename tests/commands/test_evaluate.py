"""`vsrplug evaluate`: figures under a protocol's name, in strict JSON, and a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vsrplug as library
from vsrplug import attach, save_plugins
from vsrplug.backbones import Bicubic, basicvsr_tiny
from vsrplug.commands import build, evaluate
from vsrplug.evaluation import evaluate as measure
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin

from .conftest import Job


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_metrics_json_says_what_was_measured_and_with_what(
    job: Job, tmp_path: Path, tiny: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = job("evaluate", tmp_path, *tiny["evaluate"], "protocol.clips.clips=2", "plugins=memory_bank", "seed=7")
    returned = evaluate.run(cfg)
    written = figures(tmp_path)
    assert written["protocol"] == "demo_bd_y"
    assert written["psnr"] == returned
    protocol = build.make(cfg.protocol)
    torch.manual_seed(7)
    report = measure(basicvsr_tiny(), protocol, progress=False)  # untrained plug-ins change nothing
    assert written["clips"].keys() == report.clips.keys()
    for clip, expected in report.clips.items():
        assert written["clips"][clip] == pytest.approx(expected)
    assert (written["psnr"], written["ssim"]) == pytest.approx((report.psnr, report.ssim))
    attached = MemoryBankPlugin(32, sites=["backward_output", "forward_output", "fused"])
    backbone, bank = size(basicvsr_tiny()), size(attached)
    assert written["parameters"] == {"total": backbone + bank, "trainable": 0}
    assert written["seed"] == 7
    assert written["seconds"] > 0
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert written["versions"]["vsrplug"] == library.__version__
    assert {"backbone": "basicvsr_tiny_untrained", "plugins": "memory_bank"}.items() <= written["choices"].items()
    bicubic = measure(Bicubic(4), protocol, progress=False)
    assert written["compared"]["bicubic"] == {"psnr": bicubic.psnr, "ssim": bicubic.ssim, "clips": bicubic.clips}
    assert written["compared"]["backbone"] == {key: written[key] for key in ("psnr", "ssim", "clips")}
    rows = [line for line in capsys.readouterr().err.splitlines() if "│" in line]
    assert [row.split()[1] for row in rows] == ["bicubic", "backbone", "with"]
    assert rows[1].split("│")[2].strip() == f"{report.psnr:.3f}"
    assert rows[2].split("│")[4].strip() == "+0.000"


@pytest.mark.parametrize(
    ("overrides", "columns"),
    [(["backbone=bicubic"], 3), ([], 4), (["plugins=seem"], 5), (["backbone=edvr", "backbone.frames=3"], 4)],
)
def test_the_picture_has_a_column_for_each_result(
    job: Job, tmp_path: Path, tiny: dict[str, list[str]], overrides: list[str], columns: int
) -> None:
    small = ["backbone.channels=8", "backbone.deform_groups=1"] if "backbone=edvr" in overrides else []
    evaluate.run(job("evaluate", tmp_path, *tiny["evaluate"], *overrides, *small))
    sheet = np.asarray(Image.open(tmp_path / "comparison.png").convert("RGB")).astype(int)
    # Captions stand over the columns: dark letters, parted by white.
    inked = (sheet[8:26] < 128).all(2).any(0)
    starts = [x for x in np.flatnonzero(inked) if not inked[max(0, x - 40) : x].any()]
    assert len(starts) == columns
    compared = {3: [], 4: ["bicubic"], 5: ["bicubic", "backbone"]}[columns]
    assert list(figures(tmp_path)["compared"]) == compared


def test_perfect_figures_are_still_json(job: Job, tmp_path: Path, tiny: dict[str, list[str]]) -> None:
    """Flat frames come back exactly, at infinite PSNR."""
    clip = tmp_path / "clips" / "grey"
    clip.mkdir(parents=True)
    Image.new("RGB", (64, 64), (90, 90, 90)).save(clip / "0.png")
    cfg = job("evaluate", tmp_path, "backbone=bicubic", "protocol=folder_bi_y", f"protocol.clips.root={clip.parent}")
    assert evaluate.run(cfg) == float("inf")
    assert figures(tmp_path)["psnr"] == "inf"
    assert (tmp_path / "comparison.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["protocol=vid4_bi_y", "paths.data={path}"], "there is no folder {path}/vid4; data sets are looked for under"),
        (["protocol=folder_bi_y"], "protocol.clips.root has to be given: protocol.clips.root=..."),
        (["protocol=folder_bi_y", "protocol.clips.root={path}/empty"], "folder {path}/empty holds no clips"),
        (["protocol=folder_bi_y", "protocol.clips.root={path}/torn"], "frame 1 of clip 'a'"),
    ],
)
def test_bad_data_ends_in_one_line(
    vsrplug: Callable[..., None], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    clip = tmp_path / "torn" / "a"
    clip.mkdir(parents=True)
    for name in ("0.png", "1.png", "2.png"):
        Image.new("RGB", (32, 32)).save(clip / name)
    (clip / "1.png").write_bytes((clip / "0.png").read_bytes()[:60])
    given = [argument.format(path=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        vsrplug("evaluate", "backbone=bicubic", f"hydra.run.dir={tmp_path}/run", *given)
    text = str(caught.value)
    assert text.startswith("vsrplug evaluate: ")
    assert (str(clip / "1.png") if "torn" in str(given) else message.format(path=tmp_path)) in text
    assert "\n" not in text
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_file_with_seem_asks_for_masks_as_a_command_takes_them(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]]
) -> None:
    file = tmp_path / "seem.safetensors"
    save_plugins(attach(basicvsr_tiny(), seem=SEEMPlugin(32, sites=["fused"], masks=16)), file)
    given = ["evaluate", *tiny["evaluate"], f"plugins_file={file}", f"hydra.run.dir={tmp_path}/run"]
    with pytest.raises(SystemExit, match=r"here, masks=superpixels masks\.count=16, or what it was trained with"):
        vsrplug(*given)
    vsrplug(*given, "masks=superpixels", "masks.count=16")
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.realdata
@pytest.mark.slow
def test_the_command_gives_vid4s_published_bicubic_line(real_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from vsrplug.commands import main; main()", "evaluate", "protocol=vid4_bi_y"]
    done = subprocess.run(
        [*command, "backbone=bicubic", f"hydra.run.dir={tmp_path}"],
        env={**os.environ, "VSRPLUG_DATA": str(real_data), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = figures(tmp_path)
    assert (written["protocol"], round(written["psnr"], 3), round(written["ssim"], 4)) == ("vid4_bi_y", 23.784, 0.6347)
    assert list(written["clips"]) == ["calendar", "city", "foliage", "walk"]
    assert (tmp_path / "comparison.png").exists()
    assert "protocol vid4_bi_y" in done.stderr
