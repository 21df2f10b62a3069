"""Checkpoints that are whole or not there: `WholeCheckpoints`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill or a full disk leaves the checkpoint of before.

    Lightning's own goes through the system's temporary folder. Where that is another disk, as on most clusters, its
    last step is a copy onto the only good checkpoint.
    """

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Read a checkpoint, without running code unless `weights_only` is False.

        Raises:
            ValueError: it is damaged, or asks for code.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except OSError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{path} is damaged, or holds more than data, and was not read ({reason}); remove it to start afresh"
            ) from error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written; an older file of that name is as it was.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            torch.save(checkpoint, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's own writer reports a full disk as a RuntimeError
            temporary.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written ({error}); a checkpoint that was there is as it was") from error
