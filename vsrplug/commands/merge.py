"""`vsrplug merge`: a backbone and the file of what was tuned on it, as one ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vsrplug.commands import build
from vsrplug.commands.application import command
from vsrplug.merging import check_layout, save_merged


def main() -> None:
    """Entry point of `vsrplug merge`."""
    command("merge", run)


def run(cfg: DictConfig) -> None:
    """Write the checkpoint and print its name and size.

    Raises:
        ValueError: `plugins_file` or `output` is not given, the layout has another ending, or no place for what is in
            the file.
        FileExistsError: the output exists, and `overwrite` is false.
    """
    for key, meaning in (("plugins_file", "what save_plugins wrote"), ("output", "the checkpoint to write")):
        if OmegaConf.is_missing(cfg, key):
            raise ValueError(f"{key}=... is missing: {meaning}")
    output = Path(str(cfg.output)).expanduser()
    check_layout(cfg.layout, output)
    if output.exists() and not cfg.overwrite:
        raise FileExistsError(f"output {output} exists; name another, or add overwrite=true")
    save_merged(build.make_model(cfg), output, cfg.layout)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, layout {cfg.layout}")
