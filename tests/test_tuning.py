"""Which parameters a tuning picks, its rates, and its complaints."""

from __future__ import annotations

import pytest
from torch import nn

from vsrplug import attach
from vsrplug.backbones import BasicVSR, SPyNet
from vsrplug.plugged import PluggedModel
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin
from vsrplug.tuning import Tuning


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
    tuning = Tuning(["backbone.*", "plugins.bank.*"], rates)
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
    "tuning", [Tuning(["plugins.sem.*"]), Tuning(["plugins.*"], {"backbone.flow.*": 0.1}), Tuning(["plugins.seem"])]
)
def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing(model: PluggedModel, tuning: Tuning) -> None:
    Tuning(["backbone.fusion.*"]).apply(model)
    before = learning(model)
    with pytest.raises(ValueError, match="tuning: there is no parameter that matches"):
        tuning.apply(model)
    assert learning(model) == before


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
    with pytest.raises(ValueError, match=r"there is no parameter that matches 'plugins\.seem\.\*'"):
        Tuning(["plugins.seem.*"]).apply(bare)


def test_a_plain_module_can_be_tuned_too() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert Tuning(["1.*"]).apply(network) == 4
    assert learning(network) == {"1.weight", "1.bias"}
    (group,) = Tuning().groups(network, 0.5)
    assert group["lr"] == 0.5
    assert [id(p) for p in group["params"]] == [id(p) for p in network[1].parameters()]
