"""Every yaml is a constructor call: it composes, makes its object, and has the constructor's own names and defaults."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from vsrplug import backbones, conf
from vsrplug.commands import build
from vsrplug.commands.errors import describe_error
from vsrplug.commands.keys import check_keys
from vsrplug.corrupted import BICompression, BINoise
from vsrplug.degradations import BD, BDDUF, BI, STVUN
from vsrplug.json_files import write_json
from vsrplug.plugged import attach
from vsrplug.real_degradation import Real
from vsrplug.site import SiteSpec

ROOT = Path(conf.__file__).parent
COMMANDS = ("train", "evaluate", "describe", "upscale", "merge", "demo")
GROUPS = ("backbone", "callbacks", "data", "degradation", "experiment", "logger", "losses", "masks", "optim", "plugins")
GROUPS += ("protocol", "search", "trainer", "tuning")
UNTRAINED = "backbone=basicvsr_tiny_untrained"
NEEDED = {"data=folder": ["data.root={path}"], "data=video": ["data.path={path}"]}
NEEDED["masks=cached"] = ["masks.folder={path}"]
FOLDERS = ("folder_bi_rgb", "folder_bi_y", "folder_time2_stvun_rgb")
NEEDED |= {f"protocol={name}": ["protocol.clips.root={path}"] for name in FOLDERS}

# Given when a half-built call is finished.
GIVEN_LATER = {
    "vsrplug.VSRDataModule": {"validation"},
    "vsrplug.losses.charbonnier": {"sr", "hr"},
    "vsrplug.losses.l1": {"sr", "hr"},
    "vsrplug.real_degradation.sharpen": {"clip"},
}
# Where a yaml exists to say something else than the constructor's default.
OTHERWISE = {
    "vsrplug.VSRDataModule": {"masks", "patch"},  # chosen as a group; what two cores can do
    "vsrplug.plugins.LatentAttentionPlugin": {"order"},  # the five of the paper's table 2
    "vsrplug.plugins.SEEMPlugin": {"masks"},  # as many as the mask source makes
    "vsrplug.data.folder": {"only"},  # one folder of clips for training and validation
    "vsrplug.data.reds": {"split"},
    "vsrplug.data.vimeo90k": {"split", "motion"},
    "vsrplug.protocols.Protocol": {"border", "skip_frames", "mirror", "between"},
    "vsrplug.data.DemoClips": {"split", "clips", "frames"},  # of a protocol: the held-back ones, in fours
    "vsrplug.real_degradation.Order": {"blur", "sigma", "enlarge", "shrink", "factor", "gaussian", "poisson"},  # second
    "vsrplug.real_degradation.Real": {"first", "second"},  # calls, not what they make: see test_real_degradation
    "vsrplug.tuning.Tuning": {"train", "lora"},
}


def options(group: str) -> list[str]:
    return sorted(str(f.relative_to(ROOT / group).with_suffix("")) for f in (ROOT / group).rglob("*.yaml"))


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = compose(command, list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.runtime.output_dir = "/nowhere"
    hydra.core.hydra_config.HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg


def calls(cfg: Any) -> Iterator[DictConfig]:
    """Every constructor call in a configuration, however deep."""
    if isinstance(cfg, DictConfig) and "_target_" in cfg:
        yield cfg
    if isinstance(cfg, (DictConfig, ListConfig)):
        for key in cfg if isinstance(cfg, DictConfig) else range(len(cfg)):
            if not OmegaConf.is_missing(cfg, key):
                yield from calls(cfg[key])


@pytest.fixture
def needed(tmp_path: Path) -> Any:
    """The overrides that an option cannot do without."""
    from PIL import Image

    (tmp_path / "clip").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "clip" / "0.png")
    return lambda choice: [text.format(path=tmp_path) for text in NEEDED.get(choice, [])]


CHOICES = [f"{group}={option}" for group in GROUPS for option in options(group)]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_is_a_call_with_the_constructors_names_and_defaults(choice: str, needed: Any) -> None:
    group = choice.partition("=")[0]
    others = [] if group in ("backbone", "experiment") else [UNTRAINED]
    cfg = composed("train", choice, *others, *needed(choice))
    check_keys(cfg, "train")
    for call in calls(cfg):
        given = {key: value for key, value in call.items() if not key.startswith("_")}
        parameters = dict(inspect.signature(hydra.utils.get_method(call._target_)).parameters)
        if call._target_ == "vsrplug.load_backbone":  # which hands its keywords on
            path = given.pop("path")
            assert given.pop("strict") is True
            assert path is None or group == "experiment"
            parameters = dict(inspect.signature(backbones.NETWORKS[given.pop("name")]).parameters)
        if not call._target_.startswith("vsrplug."):  # others have more than anyone wants to see
            assert given.keys() <= parameters.keys(), call
            continue
        wiring = call._target_.startswith("vsrplug.plugins.")  # made for the width of its sites, when it is attached
        later = {"channels"} if wiring else GIVEN_LATER.get(call._target_, set())
        assert given.keys() == parameters.keys() - later, call
        assert not later or call._partial_, call
        if group == "experiment" or choice == "backbone=edvr_tiny":  # a difference is what it is for
            continue
        for name in given.keys() - OTHERWISE.get(call._target_, set()):
            default = parameters[name].default
            if default is not inspect.Parameter.empty:
                assert _plain(given[name]) == ({} if "<factory>" in str(default) else _plain(default)), (call, name)


def _plain(value: Any) -> Any:
    plain = OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value
    return list(plain) if isinstance(plain, (tuple, list)) else plain


@pytest.mark.parametrize("plugins", ["none", "seem", "memory_bank", "[seem,memory_bank]", "[]"])
def test_every_choice_of_plugins_makes_these_plugins(plugins: str) -> None:
    cfg = composed("describe", UNTRAINED, f"plugins={plugins}")
    model = build.make_model(cfg)
    expected = {"none": [], "[]": [], "[seem,memory_bank]": ["seem", "memory_bank"]}.get(plugins, [plugins])
    assert list(model.plugins) == expected
    masks = build.make(cfg.masks)
    assert (masks is not None) == ("seem" in expected)  # SEEM brings them
    if masks is not None:
        assert model.plugins["seem"].masks == masks.count
    assert build.make(cfg.tuning).apply(model) == sum(p.numel() for p in model.plugins.parameters())


def serves(plugins: str, sites: dict[str, SiteSpec]) -> bool:
    """Whether every plug-in of this choice has a default site among `sites`."""
    calls = composed("describe", UNTRAINED, f"plugins={plugins}").plugins.values()
    kinds = [hydra.utils.get_class(call._target_) for call in calls]
    return bool(kinds) and all(
        any(site in sites and sites[site].kind in kind.kinds for site in kind.default_sites) for kind in kinds
    )


@pytest.mark.parametrize("option", options("backbone"))
def test_every_backbone_is_made_and_takes_every_plugin(option: str) -> None:
    small = {"basicvsr": ["backbone.blocks=1"], "edvr": ["backbone.extract_blocks=1", "backbone.reconstruct_blocks=1"]}
    small["mana"] = ["backbone.decoder_blocks=1"]
    small["iconvsr"] = small["basicvsr_pp"] = ["backbone.blocks=1"]
    small["real_basicvsr"] = ["backbone.propagation_blocks=1", "backbone.cleaning_blocks=1"]
    sites = build.make_model(composed("describe", f"backbone={option}", *small.get(option, []))).sites
    names = [name for name in options("plugins") if serves(name, sites)]
    overrides = [f"backbone={option}", f"plugins=[{','.join(names)}]", *small.get(option, [])]
    assert sorted(build.make_model(composed("describe", *overrides)).plugins) == names
    assert names  # bicubic has frames to clean


def test_degradations_are_named_after_what_they_are() -> None:
    kinds = {"bd": BD, "bd_duf": BDDUF, "bi": BI, "real": Real, "stvun": STVUN}
    kinds |= {"bi_compression": BICompression, "bi_noise": BINoise}
    assert options("degradation") == sorted([*kinds, "none"])
    for name, kind in kinds.items():
        made = build.make(composed("train", UNTRAINED, f"degradation={name}").degradation)
        assert type(made) is kind
        assert made.scale == 4


@pytest.mark.parametrize("name", options("protocol"))
def test_a_protocol_is_called_by_the_name_of_its_file(name: str) -> None:
    cfg = composed("evaluate", UNTRAINED, f"protocol={name}")
    assert cfg.protocol.name == name
    parts = r"([a-z0-9]+)_(fast_|medium_|slow_|motion_)?(?:time(\d)_|latent_)?(\w+)_(y|rgb)"
    data, motion, times, degradation, colour = re.fullmatch(parts, name).groups()
    assert cfg.protocol.between == int(times or 1) - 1
    data = {"reds4": "reds", "clips": "clips_val"}.get(data, data)
    assert cfg.protocol.colour == colour
    assert cfg.protocol.clips.get("motion", "all") == (motion or "all_").rstrip("_")
    assert cfg.protocol.clips.get("split", "test") == "test"
    septuplets = data == "vimeo90k"  # the fourth frame of seven, between the clip and its mirror image
    assert (cfg.protocol.mirror, cfg.protocol.skip_frames) == (
        septuplets,
        3 if septuplets else 2 * ("duf" in name or "latent" in name),
    )
    assert OmegaConf.to_container(cfg.protocol.degradation) == OmegaConf.to_container(
        OmegaConf.load(ROOT / "degradation" / f"{degradation}.yaml")
    )
    assert cfg.protocol.clips._target_ == OmegaConf.load(ROOT / "data" / f"{data}.yaml")._target_
    if data == "demo":
        protocol = build.make(cfg.protocol)
        assert (protocol.clips.split, len(protocol.clips)) == ("test", 8)


@pytest.mark.parametrize("option", options("data"))
def test_every_data_source_is_made(option: str, needed: Any, tmp_path: Path) -> None:
    cfg = composed("train", UNTRAINED, f"data={option}", f"paths.data={tmp_path}", *needed(f"data={option}"))
    if option == "demo":
        assert len(build.make(cfg.data)) == 256
    elif option == "folder":
        assert [clip.name for clip in build.make(cfg.data)] == ["clip"]
    else:  # the message of the source itself: there is no such data here
        with pytest.raises(InstantiationException) as caught:
            build.make(cfg.data)
        text = describe_error(caught.value)
        folder = option.removesuffix("_train").removesuffix("_val")
        assert ("holds no video files" if option == "video" else f"there is no folder {tmp_path}/{folder}") in text


def test_trainer_callbacks_loggers_and_optimizers_are_made(tmp_path: Path) -> None:
    for choice in ("callbacks=default", "callbacks=ema"):
        cfg = composed("train", UNTRAINED, choice, f"paths.runs={tmp_path}", "trainer.accelerator=cpu")
        callbacks = build.make_each(cfg.callbacks)
        trainer = build.make({**build.as_plain(cfg.trainer), "callbacks": [*callbacks.values()], "logger": False})
        assert trainer.max_steps == 1000
        assert set(callbacks.values()) <= set(trainer.callbacks)
        assert type(trainer.strategy.checkpoint_io).__name__ == "WholeCheckpoints"
        assert not trainer._accelerator_connector.use_distributed_sampler
    loggers = build.make_each(cfg.logger).values()
    assert [type(logger).__name__ for logger in loggers] == ["CSVLogger", "TensorBoardLogger"]
    optimizer = build.make(cfg.optim.optimizer)([torch.nn.Parameter(torch.zeros(2))])
    schedule = build.make(cfg.optim.schedule)(optimizer)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], schedule.T_max) == (2e-4, (0.9, 0.99), 1000)


def test_entries_set_to_null_are_left_out() -> None:
    cfg = composed("train", UNTRAINED, "plugins=[seem,memory_bank]", "plugins.seem=null", "callbacks.rate=null")
    check_keys(cfg, "train")
    assert list(build.make_model(cfg).plugins) == ["memory_bank"]
    assert "rate" not in build.make_each(cfg.callbacks)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_knows_its_own_keys(command: str) -> None:
    cfg = composed(command, UNTRAINED)
    check_keys(cfg, command)
    cfg["protocoll"] = 1
    with pytest.raises(ValueError, match="there is no configuration key 'protocoll'"):
        check_keys(cfg, command)


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in ("experiment", "search") for name in options(group)])
def test_what_an_experiment_says_is_what_runs(choice: str) -> None:
    """A value in the body of train.yaml once won over the experiment's, and a run had twice the batch it claimed."""
    said: Any = OmegaConf.to_container(OmegaConf.load(ROOT / f"{choice.replace('=', '/')}.yaml"))
    runs: Any = OmegaConf.to_container(composed("train", "experiment=demo", choice), resolve=False)

    def check(said: Any, runs: Any, path: str) -> None:
        for key, value in said.items():
            if isinstance(value, dict) and value:
                check(value, runs[key], f"{path}{key}.")
            else:
                assert runs[key] == value, f"{path}{key}"

    for key in ("defaults", "hydra"):  # what Hydra reads itself
        said.pop(key, None)
    check(said, runs, "")


def test_a_plugin_attached_to_a_composed_backbone_is_the_identity() -> None:
    cfg = composed("describe", UNTRAINED, "plugins=memory_bank")
    model, frames = build.make_model(cfg), torch.rand(1, 2, 3, 8, 8)
    assert torch.equal(model(frames), attach(model.backbone)(frames))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("plugins=seem,seed=1", "plugins=seem,seed=1"),
        ("plugins=[seem,memory_bank]", "plugins=seem+memory_bank"),
        ("backbone.path=/data/My Files/a.pth", "backbone.path=-data-My-Files-a.pth"),
        ("", "defaults"),
    ],
)
def test_folders_of_a_sweep_have_names_for_people(overrides: str, name: str) -> None:
    assert build.folder_name(overrides) == name


def test_long_names_are_cut_and_kept_apart() -> None:
    names = {build.folder_name("a=" + letter * 200 + last) for letter in "x字" for last in "12"}
    assert len(names) == 4
    assert all(len(name.encode()) < 110 for name in names)


def test_written_figures_are_strict_json(tmp_path: Path) -> None:
    write_json({"psnr": 1.5}, tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json({"psnr": float("nan")}, tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"psnr": 1.5}
