"""Commands on networks and clips so small that a run takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from vsrplug.commands import main
from vsrplug.commands.keys import check_keys

Job = Callable[..., DictConfig]


@pytest.fixture
def tiny() -> dict[str, list[str]]:
    """Overrides for each command."""
    clips = ["protocol=demo_bd_y", "protocol.clips.clips=1", "protocol.clips.size=[64,96]", "protocol.clips.frames=4"]
    measured = ["backbone=basicvsr_tiny_untrained", *clips]
    data = ["data.clips=2", "data.size=[64,64]", "data.frames=8"]
    samples = ["datamodule.patch=8", "datamodule.frames=3", "datamodule.batch_size=1"]
    running = ["trainer.accelerator=cpu", "callbacks.checkpoint.every_n_train_steps=2", "trainer.val_check_interval=4"]
    running += ["trainer.log_every_n_steps=1"]
    return {"train": [*measured, *data, *samples, *running], "evaluate": measured, "describe": measured[:1]}


@pytest.fixture
def job() -> Job:
    """Composes what a command would be given, without starting a process for it."""

    def composed(command: str, folder: Path, *overrides: str) -> DictConfig:
        with initialize_config_module("vsrplug.conf", version_base="1.3"):
            cfg = compose(command, list(overrides), return_hydra_config=True)
        folder.mkdir(parents=True, exist_ok=True)
        with open_dict(cfg):
            OmegaConf.set_readonly(cfg.hydra, False)
            cfg.hydra.runtime.output_dir = str(folder)
            HydraConfig.instance().set_config(cfg)
            del cfg["hydra"]
        check_keys(cfg, command)
        return cfg

    return composed


@pytest.fixture
def vsrplug(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line, in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["/usr/bin/vsrplug", *arguments])
        main()

    return run
