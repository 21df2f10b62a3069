"""`vsrplug describe`, and what all commands share: help, and errors of one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vsrplug import conf
from vsrplug.backbones import basicvsr_tiny
from vsrplug.commands import COMMANDS, describe
from vsrplug.plugins import MemoryBankPlugin

from .conftest import Job

UNTRAINED = "backbone=basicvsr_tiny_untrained"
PLUGINS = sorted(file.stem for file in Path(conf.__file__).parent.glob("plugins/*.yaml"))


def size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_describe_counts_what_learns_and_shows_where_plugins_are(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    describe.run(job("describe", tmp_path, UNTRAINED, "plugins=memory_bank"))
    text = capsys.readouterr().out
    backbone, bank = size(basicvsr_tiny()), size(MemoryBankPlugin(32).at["fused"]) * 3
    total = backbone + bank
    assert f"{bank:,} of {total:,} parameters learn ({bank / total:.1%})" in text
    assert f"backbone BasicVSR x4: {backbone:,} parameters, frozen" in text
    assert f"plug-in memory_bank (MemoryBankPlugin) at backward_output, forward_output, fused: {bank:,}" in text
    served = {line.split()[2]: line for line in text.splitlines() if "channels" in line}
    assert [site for site, line in served.items() if "<- memory_bank" in line] == [
        "backward_output",
        "forward_output",
        "fused",
    ]
    assert re.search(r"input +clip, 3 channels", served["input"])
    assert re.search(r"forward_warped +frame, 32 channels$", served["forward_warped"].rstrip())


def test_describe_follows_the_tuning(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe.run(job("describe", tmp_path, UNTRAINED, "tuning=full", 'tuning.train=["backbone.fusion.*"]'))
    fusion, total = size(basicvsr_tiny().fusion), size(basicvsr_tiny())
    assert f"{fusion:,} of {total:,} parameters learn" in capsys.readouterr().out


def test_describe_leaves_nothing_behind(
    vsrplug: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vsrplug("describe", UNTRAINED, "plugins=[]")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(
    vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    vsrplug(*arguments)
    text = capsys.readouterr().out
    for command, line in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(line)}$", text, re.MULTILINE)


def test_help_of_a_command_lists_its_groups(vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        vsrplug("train", "--help")
    assert not caught.value.code
    text = capsys.readouterr().out
    assert f"plugins: {', '.join(PLUGINS)}" in text
    assert "tuning: full, plugins_only" in text
    assert text.startswith("train is powered by Hydra.")


def test_version(vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    vsrplug("--version")
    assert re.fullmatch(r"vsrplug \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_an_unknown_command_offers_the_nearest(vsrplug: Callable[..., None]) -> None:
    with pytest.raises(
        SystemExit, match=r"^vsrplug: there is no command 'trian'; did you mean 'train'\? Known: train,"
    ):
        vsrplug("trian")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plugins=seem", "plugins.seem.sites=[fuse]"],
            "plug-in 'seem': there is no site 'fuse'; did you mean 'fused'?",
        ),
        (["backbone=basicvsr", "backbone.name=basicvrs"], "there is no backbone 'basicvrs'; did you mean 'basicvsr'"),
        (["backbone=basicvsr", "backbone.path=/no/such.pth"], "there is no weights file /no/such.pth"),
        (["backbone=edvr", "backbone.frames=4"], "frames must be odd"),
        (
            ["plugins=seem", "tuning.train=[plugins.sem.*]"],
            "tuning: there is no parameter that matches 'plugins.sem.*'",
        ),
        (["plugins_file=/no/such.safetensors"], "there is no plug-in file /no/such.safetensors"),
        (
            ["plugins=seem", "masks=none"],
            "ConfigTypeError raised while resolving interpolation: Error trying to access",
        ),
        (["+tunning=1"], "there is no configuration key 'tunning'; did you mean 'tuning'"),
    ],
)
def test_an_expected_error_is_one_line(
    vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    backbone = [] if arguments[0].startswith("backbone") else [UNTRAINED]
    with pytest.raises(SystemExit) as caught:
        vsrplug("describe", *backbone, *arguments)
    text = str(caught.value)
    assert text.startswith(f"vsrplug describe: {message}")
    assert "\n" not in text
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("plugins=sem", r"Could not find 'plugins/sem'\s+Available options in 'plugins':\s+" + r"\s+".join(PLUGINS)),
        ("backbone=basicvrs", r"Could not find 'backbone/basicvrs'\s+Available options in 'backbone':\s+basicvsr\s"),
        ("tuning.trane=[a]", r"Could not override 'tuning\.trane'"),
    ],
)
def test_what_does_not_compose_is_explained_without_a_traceback(
    vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        vsrplug("describe", argument)
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert re.search(message, text)
    assert "Traceback" not in text


def test_the_traceback_is_there_for_who_asks(vsrplug: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="there is no site 'fuse'"):
        vsrplug("describe", UNTRAINED, "plugins=seem", "plugins.seem.sites=[fuse]")


def test_an_error_that_may_be_a_mistake_in_code_says_how_to_see_more(
    vsrplug: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsrplug.commands.describe.summary", lambda model: {}["no such key"])
    with pytest.raises(SystemExit, match=r"^vsrplug describe: no such key \(HYDRA_FULL_ERROR=1 shows where\)$"):
        vsrplug("describe", UNTRAINED)
