"""A checkpoint is the new one or the old one, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vsrplug.checkpoints import WholeCheckpoints


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The child dies, as by SIGKILL, when half of the file is written."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    child = os.fork()
    if not child:

        def half(checkpoint: Any, file: Path) -> None:
            Path(file).write_bytes(b"PK half of a checkpoint")
            os._exit(0)

        torch.save = half
        WholeCheckpoints().save_checkpoint({"step": 2}, path)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert WholeCheckpoints().load_checkpoint(path, weights_only=True) == {"step": 1}
    WholeCheckpoints().save_checkpoint({"step": 3}, path)
    assert WholeCheckpoints().load_checkpoint(path, weights_only=True) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]  # what the kill left is gone


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)

    def full(checkpoint: Any, file: Path) -> None:
        Path(file).write_bytes(b"PK")
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")  # torch's words

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"last\.ckpt could not be written \(.*\); a checkpoint that was there is as it was"
    ):
        WholeCheckpoints().save_checkpoint({"step": 2}, path)
    assert WholeCheckpoints().load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
