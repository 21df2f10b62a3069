"""`vsrplug describe`: sites, parts, what learns, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vsrplug import attach, conf
from vsrplug.backbones import basicvsr_tiny
from vsrplug.commands import describe
from vsrplug.plugins import MemoryBankPlugin

from .conftest import Job

UNTRAINED = "backbone=basicvsr_tiny_untrained"
SMALL = ["frames=2", "size=[8,8]"]
TUNINGS = sorted(file.stem for file in Path(conf.__file__).parent.glob("tuning/*.yaml"))
PLUGINS = sorted(file.stem for file in Path(conf.__file__).parent.glob("plugins/*.yaml"))


def size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def printed(capsys: pytest.CaptureFixture[str], cfg: Any) -> str:
    describe.run(cfg)
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
def test_describe_shows_sites_parts_and_what_learns(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = printed(capsys, job("describe", tmp_path, UNTRAINED, "plugins=memory_bank", "frames=3", "size=[16,24]"))
    assert max(map(len, text.splitlines())) <= columns
    network = basicvsr_tiny()
    backbone, bank = size(network), size(MemoryBankPlugin(32).at["fused"]) * 3
    total = backbone + bank
    assert text.startswith(f"{bank:,} of {total:,} parameters learn ({bank / total:.1%})\n├── backbone BasicVSR x4\n")
    served = {line.split()[2]: line for line in text.splitlines() if "channels" in line}
    assert list(served) == list(network.sites)
    assert [site for site, line in served.items() if "<- memory_bank" in line] == [
        "backward_output",
        "forward_output",
        "fused",
    ]
    assert re.search(r"input +clip, 3 channels", served["input"])
    assert re.search(r"forward_warped +frame, 32 channels$", served["forward_warped"].rstrip())

    def formula(t: int, pixels: int) -> tuple[float, float]:
        trunk = 2 * (9 * 35 * 32 + 16 * 9 * 32 * 32)
        head = 9 * 32 * 128 + 4 * 9 * 32 * 64 + 16 * 9 * (16 * 16 + 16 * 3)
        banks = 3 * (32 * 16 + 2 * 16 * 256 + 16 * 32)
        return 2 * t * pixels * (trunk + 64 * 32 + head) / 1e9, 2 * t * pixels * banks / 1e9

    own, added = formula(3, 16 * 24)
    assert [line.split()[1:] for line in text.splitlines() if re.search(r"^(├── parts|│   \w)", line)] == [
        ["parts", "parameters", "learn", "GFLOP"],
        ["backbone", f"{backbone:,}", "0", f"{own:.2f}"],
        ["memory_bank", "MemoryBankPlugin", f"{bank:,}", f"{bank:,}", f"{added:.2f}"],
        ["together", f"{total:,}", f"{bank:,}", f"{own + added:.2f}"],
    ]
    assert f"forward: 3 frames of 16x24 -> 3 frames, {(own + added) / 3:.2f} GFLOP each" in text
    assert f"group x1: {bank:,} parameters, lr 0.0002, weight decay 0" in text
    # Adam: two moments of every scalar, and a count of four bytes for every tensor
    held = [4 * total, 4 * bank, 8 * bank + 4 * 7 * 3]
    expected = "memory {:.2f} MB: parameters {:.2f}, gradients {:.2f}, Adam {:.2f}".format(
        *(value / 1e6 for value in (sum(held), *held))
    )
    assert expected in text


def test_describe_follows_the_tuning(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, job("describe", tmp_path, UNTRAINED, "tuning=full", "tuning.train=[backbone.fusion.*]", *SMALL)
    )
    fusion, total = size(basicvsr_tiny().fusion), size(basicvsr_tiny())
    assert f"{fusion:,} of {total:,} parameters learn" in text
    assert "trains backbone.fusion.*" in text


def test_describe_shows_every_phase_with_its_groups(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    cfg = job("describe", tmp_path, UNTRAINED, "plugins=memory_bank", "tuning=staged", *SMALL)
    cfg.optim.optimizer = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}
    cfg.tuning.phases = {
        "first": {"train": ["plugins.*"], "steps": 1500, "weight_decay": {"*.memory": 0.25}},
        "second": {"freeze": ["backbone.forward_trunk.*"], "rates": {"backbone.*": 0.5}, "lr": 1e-4, "steps": 10},
        "third": {},
    }
    text = printed(capsys, cfg)
    network, bank = basicvsr_tiny(), size(MemoryBankPlugin(32).at["fused"]) * 3
    memory, everything = 3 * 16 * 256, size(network) + bank
    trunk = size(network.forward_trunk)
    lines = [re.sub("^[ │├└─]+", "", line).rstrip() for line in text.splitlines()]
    lines = lines[lines.index("tuning; memory is without activations") + 1 :]
    groups = [line for line in lines if not line.startswith("memory ")]
    assert groups == [
        "first, 1,500 steps: trains plugins.*",
        f"group x1 decay 0.25: {memory:,} parameters, lr 0.001, weight decay 0.25",
        f"group x1: {bank - memory:,} parameters, lr 0.001, weight decay 0.01",  # AdamW's own
        f"frozen: {size(network):,} parameters",
        "second, 10 steps: trains * without backbone.forward_trunk.*",
        f"group x0.5: {size(network) - trunk:,} parameters, lr 5e-05, weight decay 0.01",
        f"group x1: {bank:,} parameters, lr 0.0001, weight decay 0.01",
        f"frozen: {trunk:,} parameters",
        "third, to the end: trains *",
        f"group x1: {everything:,} parameters, lr 0.0001, weight decay 0.01",  # goes on with the rate of the second
    ]
    assert f"gradients {4 * bank / 1e6:.2f}, AdamW {8 * bank / 1e6:.2f}" in lines[4]
    assert text.startswith(f"{everything:,} of {everything:,} parameters learn")  # in one phase or another


def test_describe_gives_the_pass_what_it_needs(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    small = ["backbone.channels=16", "backbone.extract_blocks=1", "backbone.reconstruct_blocks=1"]
    plugins = ["plugins=[seem,latent_attention]", "masks.count=5", "plugins.latent_attention.external_keys=true"]
    text = printed(capsys, job("describe", tmp_path, "backbone=edvr", *small, *plugins, "size=[8,8]"))
    assert re.search(r"forward: 5 frames of 8x8, 5 masks, 1 key frame -> 1 frame, \d+\.\d\d GFLOP each", text)
    assert "not counted" not in text


def test_describe_of_what_has_nothing_to_learn(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, job("describe", tmp_path, "backbone=bicubic"))
    assert "0 of 0 parameters learn (0.0%)" in text
    assert "forward: 7 frames of 64x64 -> 7 frames" in text
    assert "nothing learns: the model is measured as it is" in text


def test_describe_says_what_it_cannot_know(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(self: MemoryBankPlugin, context: Any) -> None:
        if context.frames.mean() >= 0:
            raise ValueError

    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(MemoryBankPlugin, "prepare", prepare)
    optimizer = ["optim.optimizer._target_=torch.optim.LBFGS", "~optim.optimizer.betas"]
    cfg = job("describe", tmp_path, UNTRAINED, "plugins=memory_bank", *optimizer, *SMALL)
    text = printed(capsys, cfg)
    assert re.search(r"memory_bank MemoryBankPlugin +[\d,]+ +[\d,]+ +not counted\n", re.sub(" +\n", "\n", text))
    assert re.search(r"together +[\d,]+ +[\d,]+ +not counted", text)
    assert "forward: 2 frames of 8x8 -> 2 frames\n" in re.sub(" +\n", "\n", text)
    assert "not counted, memory_bank: it reads values back to decide what to do" in text
    assert "optimizer unknown: LBFGS.step() missing 1 required positional argument: 'closure'" in text


def test_describe_an_experiment(vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    vsrplug("describe", "experiment=demo", "plugins=memory_bank", *SMALL)
    assert "lr 0.002," in capsys.readouterr().out


def test_the_summary_at_the_start_of_training_counts_no_operations() -> None:
    tree = describe.summary(attach(basicvsr_tiny(), bank=MemoryBankPlugin))
    console = Console(width=80)
    with console.capture() as captured:
        console.print(tree)
    assert "parameters" in captured.get()
    assert "GFLOP" not in captured.get()


def test_describe_leaves_nothing_behind(
    vsrplug: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vsrplug("describe", UNTRAINED, "plugins=[]", *SMALL)
    assert not list(tmp_path.rglob("*"))
