"""Which parameters a tuning picks, its rates, and its complaints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vsrplug import attach
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.plugged import PluggedModel
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin
from vsrplug.plugins._deformable import DeformablePack
from vsrplug.tuning import Staged, Tuning


@pytest.fixture
def model() -> PluggedModel:
    backbone = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), reconstruction_channels=4)
    return attach(backbone, seem=SEEMPlugin(8, masks=2), bank=MemoryBankPlugin(8, groups=4, entries=4))


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("train", "prefixes"),
    [
        (["*"], ("backbone.", "plugins.")),
        (["plugins.*"], ("plugins.",)),
        (["plugins.bank.*", "backbone.fusion.*"], ("plugins.bank.", "backbone.fusion.")),
        (["*.memor?"], tuple(f"plugins.bank.at.{s}.memory" for s in ("backward_output", "forward_output", "fused"))),
    ],
)
def test_exactly_what_the_patterns_match_learns(
    model: PluggedModel, train: list[str], prefixes: tuple[str, ...]
) -> None:
    Tuning(["backbone.*"]).apply(model)  # whatever was chosen before
    count = Tuning(train).apply(model)
    expected = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert learning(model) == expected
    assert count == sum(p.numel() for name, p in model.named_parameters() if name in expected)


def test_groups_hold_each_trainable_parameter_once_at_the_rate_of_the_first_pattern(model: PluggedModel) -> None:
    rates = {"backbone.spynet.*": 0.125, "backbone.*": 0.5}
    tuning = Tuning(["backbone.*", "plugins.bank.*"], rates=rates)
    tuning.apply(model)
    groups = tuning.groups(model, 1e-2)
    by_rate = {group["lr"]: {id(p) for p in group["params"]} for group in groups}
    expected: dict[float, set[int]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("plugins.seem."):
            continue
        lr = 1.25e-3 if name.startswith("backbone.spynet.") else 5e-3 if name.startswith("backbone.") else 1e-2
        expected.setdefault(lr, set()).add(id(parameter))
    assert by_rate == expected
    assert sum(len(group["params"]) for group in groups) == sum(map(len, expected.values()))
    assert {group["name"] for group in groups} == {"x0.125", "x0.5", "x1"}


@pytest.mark.parametrize(
    "tuning",
    [Tuning(["plugins.sem.*"]), Tuning(["plugins.*"], rates={"backbone.flow.*": 0.1}), Tuning(["plugins.seem"])],
)
def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing(model: PluggedModel, tuning: Tuning) -> None:
    Tuning(["backbone.fusion.*"]).apply(model)
    before = learning(model)
    with pytest.raises(ValueError, match="tuning: there is no parameter that matches"):
        tuning.apply(model)
    assert learning(model) == before


def test_a_pattern_alone_is_no_list() -> None:
    for name in ("train", "freeze"):
        with pytest.raises(
            ValueError, match=rf"^tuning: {name} is a list of patterns, got 'a\.\*'; try {name}=\[a\.\*\]$"
        ):
            Tuning(**{name: "a.*"})


def test_the_error_offers_the_nearest_names(model: PluggedModel) -> None:
    message = (
        r"matches 'plugins\.sem\.\*'; did you mean 'plugins\.seem\.at' .*Known: backbone\.spynet\.\w+, .*bank\.at\.$"
    )
    with pytest.raises(ValueError, match=message):
        Tuning(["plugins.sem.*"]).apply(model)


def test_plugins_only_without_plugins_is_the_frozen_baseline(model: PluggedModel) -> None:
    bare = attach(model.backbone)
    assert Tuning(["plugins.*"]).apply(bare) == 0
    assert not learning(bare)
    assert Tuning(["plugins.*"]).groups(bare, 1e-3) == []
    assert Tuning([]).apply(model) == 0
    with pytest.raises(ValueError, match=r"there is no parameter that matches 'plugins\.seem\.\*'"):
        Tuning(["plugins.seem.*"]).apply(bare)


def test_a_plain_module_can_be_tuned_too() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert Tuning(["1.*"]).apply(network) == 4
    assert learning(network) == {"1.weight", "1.bias"}
    (group,) = Tuning().groups(network, 0.5)
    assert group["lr"] == 0.5
    assert [id(p) for p in group["params"]] == [id(p) for p in network[1].parameters()]


def test_freeze_takes_out_what_train_names(model: PluggedModel) -> None:
    Tuning(["plugins.*", "backbone.fusion.*"], ["plugins.seem.*", "*.bias"]).apply(model)
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("plugins.bank.", "backbone.fusion.")) and not name.endswith(".bias")
    }
    assert learning(model) == expected


def test_words_stand_for_kinds_of_parameters() -> None:
    torch.manual_seed(0)
    network = attach(EDVR(8, 3, 1, 1, 2), bank=MemoryBankPlugin(8, groups=4, entries=4, sites=("fused",)))
    names = {name for name, _ in network.named_parameters()}
    Tuning(["bias"]).apply(network)
    assert learning(network) == {name for name in names if name.endswith(".bias") and name.startswith("backbone.")}
    Tuning(["offsets"]).apply(network)
    packs = [name for name, module in network.named_modules() if isinstance(module, DeformablePack)]
    assert len(packs) == 4  # three levels and the cascade
    assert learning(network) == {f"{pack}.conv_offset.{kind}" for pack in packs for kind in ("weight", "bias")}
    flow = attach(BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4))))
    Tuning(["flow"]).apply(flow)
    assert learning(flow) == {f"backbone.spynet.{name}" for name, _ in flow.backbone.spynet.named_parameters()}


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("norm", "the backbone has no normalisation layer"),
        ("offsets", "has no deformable alignment"),
        ("lora", r"no low-rank layers are there: give lora=LoRA\(\.\.\.\)"),
    ],
)
def test_a_word_that_fits_nothing_says_why(word: str, reason: str) -> None:
    backbone = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)))
    bank = MemoryBankPlugin(8, groups=4, entries=4)  # its own normalisation is not the backbone's
    with pytest.raises(ValueError, match=f"tuning: '{word}' matches nothing, .*{reason}; leave it out"):
        Tuning([word, "plugins.*"]).apply(attach(backbone, bank=bank))


def test_nothing_left_to_train_is_an_error(model: PluggedModel) -> None:
    with pytest.raises(ValueError, match=r"without freeze=\['\*'\] leaves nothing to train; known: back"):
        Tuning(["plugins.*"], ["*"]).apply(model)


def test_weight_decay_goes_by_patterns(model: PluggedModel) -> None:
    """AdamW without gradients shrinks each weight by lr * decay, and by its own decay where no pattern says it."""
    tuning = Tuning(weight_decay={"*.bias": 0.0, "plugins.*": 0.5}, rates={"flow": 0.1})
    tuning.apply(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(tuning.groups(model, 0.1), weight_decay=0.25)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.0 if name.endswith(".bias") else 0.5 if name.startswith("plugins.") else 0.25
        rate = 0.01 if ".spynet." in name else 0.1
        assert torch.allclose(parameter, before[name] * (1 - rate * decay), rtol=1e-6), name


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({}, "one phase or more, got none"),
        ({"a": {"step": 3}}, r"phase 'a': there is no argument 'step'; did you mean 'steps'"),
        ({"a": {}, "b": {}}, "phase 'a' has no steps; only the last may go on"),
        ({"a": {"steps": 0}}, "phase 'a' has steps=0; a phase takes one step or more"),
        ({"a": {"lora": object()}}, "phase 'a': lora belongs to the whole run"),
    ],
)
def test_bad_phases(phases: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Staged(phases)


def test_every_phase_is_checked_before_anything_changes(model: PluggedModel) -> None:
    Tuning(["backbone.fusion.*"]).apply(model)
    before = learning(model)
    staged = Staged({"good": {"steps": 1}, "bad": {"train": ["plugins.sem.*"]}})
    with pytest.raises(ValueError, match=r"phase 'bad': tuning: there is no parameter that matches 'plugins\.sem\.\*'"):
        staged.apply(model)
    assert learning(model) == before
    good = Staged({"bank": {"steps": 1, "train": ["plugins.bank.*"]}, "seem": {"train": ["plugins.seem.*"]}})
    good.apply(model)
    assert learning(model) == {name for name, _ in model.named_parameters() if name.startswith("plugins.bank.")}
    assert good.trained(model) == {name for name, _ in model.named_parameters() if name.startswith("plugins.")}
