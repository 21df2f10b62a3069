"""What all commands share: help, and errors of one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from vsrplug import conf
from vsrplug.commands import COMMANDS, train

CONF = Path(conf.__file__).parent
UNTRAINED = "backbone=basicvsr_tiny_untrained"
TUNINGS = sorted(file.stem for file in CONF.glob("tuning/*.yaml"))
PLUGINS = sorted(file.stem for file in CONF.glob("plugins/*.yaml"))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(
    vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    vsrplug(*arguments)
    text = capsys.readouterr().out
    for command, line in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(line)}$", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_its_own_file(
    vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """No group that it would refuse, what it takes by itself, and every comment."""
    vsrplug(command, "--help")
    text = capsys.readouterr().out
    shown = dict(re.findall(r"^  (\w+)=(.*)$", text, flags=re.MULTILINE))
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = compose(command, return_hydra_config=True)
    chosen = {str(group): str(option) for group, option in cfg.hydra.runtime.choices.items()}
    expected = {group: option for group, option in chosen.items() if not re.search("hydra|@|/", group)}
    plugins = shown.pop("plugins", "none").replace("none", "").split("+")  # of a list Hydra keeps no choice
    assert plugins == (list(cfg.get("plugins", {})) or [""])
    if command == "demo":
        assert expected.pop("masks") == "superpixels" != shown.pop("masks")  # its experiment chose them
    assert shown == {group: "null" if option == "None" else option for group, option in expected.items()}
    comments = re.findall(r"^# (.*)$", (CONF / f"{command}.yaml").read_text(), flags=re.MULTILINE)
    assert all(comment in text for comment in comments)
    own = {str(key) for key in cfg} - set(chosen) - {"hydra", "plugins"}
    assert all(re.search(rf"^{key}:", text, flags=re.MULTILINE) for key in own)
    assert "\nhydra:" not in text


def test_help_lists_the_choices_of_a_group_and_those_of_ones_own(
    vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "response.yaml").write_text("response: {_target_: my.Response}\n")
    vsrplug("train", "--config-dir", str(tmp_path), "--help")
    text = " ".join(capsys.readouterr().out.split())
    plugins = sorted({*PLUGINS, "response"} - {"none"})
    assert f"plugins=none or {', '.join(plugins)} tuning=" in text
    assert f"tuning=plugins_only or {', '.join(name for name in TUNINGS if name != 'plugins_only')} data=" in text
    assert "clips/: basicvsr_tiny, edvr_tiny clips/adapt/: basicvsr," in text


def test_version(vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    vsrplug("--version")
    assert re.fullmatch(r"vsrplug \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_an_unknown_command_offers_the_nearest(vsrplug: Callable[..., None]) -> None:
    with pytest.raises(
        SystemExit, match=r"^vsrplug: there is no command 'trian'; did you mean 'train' or 'motion'\? Known: train,"
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
        (["frames=0"], "a clip has one frame or more and a size [height, width], got frames=0, size=[64, 64]"),
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
        ("plugins=sem", f"there is no choice of plugins 'sem'; did you mean 'seem'? Known: {', '.join(PLUGINS)}."),
        ("plugins=[seem,memry_bank]", "there is no choice of plugins 'memry_bank'; did you mean 'memory_bank' or "),
        ("backbone=basicvrs", "there is no choice of backbone 'basicvrs'; did you mean 'basicvsr'"),
        (
            "experiment=clips/edvr_tny",
            "there is no choice of experiment 'clips/edvr_tny'; did you mean 'clips/edvr_tiny'",
        ),
        ("hydra/launcher=jobib", "there is no choice of hydra/launcher 'jobib'; did you mean 'joblib'"),
        ("optm=adam", "there is no configuration key 'optm'; did you mean 'optim'"),
        ("trainer.max_stepz=4", "there is no configuration key 'trainer.max_stepz'; did you mean 'trainer.max_steps'"),
        ("seed=[1", "'seed=[1' cannot be read as key=value: no viable alternative at input '[1'; quotes keep"),
        ("backbone.path", "'backbone.path' cannot be read as key=value: missing EQUAL at '<EOF>'; quotes keep"),
        ("experment=demo", "there is no configuration key 'experment'; did you mean 'experiment'?"),
        ("optim.lr=1e-3", "there is no configuration key 'optim.lr'; did you mean 'optim.optimizer.lr'?"),
        (
            "plugins.memory_bank.entries=12",
            "there is no configuration key 'plugins.memory_bank'. Known: none. Choose it first: plugins=memory_bank.",
        ),
        ("trainer.max_time=4", "there is no configuration key 'trainer.max_time'; did you mean 'trainer.max_steps'"),
        (
            "hydra/sweeper=optna",
            "there is no choice of hydra/sweeper 'optna'; did you mean 'optuna'? Known: basic, optuna",
        ),
        ("~plugin", "Could not delete from config. 'plugin' does not exist."),
    ],
)
@pytest.mark.parametrize("mode", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_what_does_not_compose_ends_in_one_line_with_the_nearest_names(
    vsrplug: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argument: str, message: str,
    mode: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        vsrplug("train", *mode, argument)
    text = str(caught.value)
    assert text.startswith(f"vsrplug train: {message}")
    assert "\n" not in text
    takes = argument.startswith("trainer.max_time")
    assert text.endswith(" One that the file leaves out takes a plus: +trainer.max_time=...") is takes
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert not list(tmp_path.rglob("metrics.json"))


def test_several_values_without_m(vsrplug: Callable[..., None]) -> None:
    expected = (
        "'plugins=seem,efst' is several values: -m runs one after another, plugins=[seem,efst] takes them at once"
    )
    with pytest.raises(SystemExit) as caught:
        vsrplug("train", "plugins=seem,efst")
    assert str(caught.value) == f"vsrplug train: {expected}"


def test_what_a_protocol_has_of_its_own(vsrplug: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match=r"'degradation'\. .* Here it is degradation@protocol\.degradation=\.\.\.$"):
        vsrplug("evaluate", "degradation=bi")
    with pytest.raises(SystemExit, match=r"on the command line degradation@protocol\.degradation=bi$"):
        vsrplug("evaluate", "protocol=demo_bd_y", "protocol.degradation=bi")


def test_flags_stand_anywhere(vsrplug: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    seen: list[int] = []
    monkeypatch.setattr(train, "run", lambda cfg: seen.append(cfg.seed))
    (tmp_path / "my").mkdir()
    vsrplug("train", "tuning=full", "--config-dir", str(tmp_path / "my"), "-m", "seed=3,4", "trainer.max_steps=2")
    assert seen == [3, 4]
    (folder,) = tmp_path.glob("sweeps/*")
    assert folder.name == "tuning=full,seed=3,4,trainer.max_steps=2"
    assert {job.name for job in folder.iterdir() if job.is_dir()} == {"seed=3", "seed=4"}


def test_help_into_a_pipe_that_closes() -> None:
    """As of `vsrplug train --help | head`."""
    script = "import sys; from vsrplug.commands import main; sys.argv[1:] = ['train', '-h']; sys.stdin.read(); main()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    running = subprocess.Popen([sys.executable, "-c", script], **pipes)
    assert running.stdin is not None
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    running.stdin.close()
    assert running.wait() == 1
    assert running.stderr.read() == b""


def test_only_what_runs_many_times_takes_m(vsrplug: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match=r"^vsrplug report: -m is for train and evaluate; leave it out$"):
        vsrplug("report", "-m", "somewhere")


def test_the_traceback_is_there_for_who_asks(vsrplug: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="there is no site 'fuse'"):
        vsrplug("describe", UNTRAINED, "plugins=seem", "plugins.seem.sites=[fuse]")


def test_an_error_that_may_be_a_mistake_in_code_says_how_to_see_more(
    vsrplug: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsrplug.commands.describe.summary", lambda *_: {}["no such key"])
    with pytest.raises(SystemExit, match=r"^vsrplug describe: no such key \(HYDRA_FULL_ERROR=1 shows where\)$"):
        vsrplug("describe", UNTRAINED)
