"""`attach` and `PluggedModel`: what one does with a model (copies, EMA, DDP, compile...), and every check."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from vsrplug import Context, ForeignSite, PluggedModel, Plugin, SiteSpec, attach
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin

C, MASKS = 16, 5


def basicvsr(channels: int = C) -> BasicVSR:
    network = BasicVSR(channels, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def edvr() -> EDVR:
    return EDVR(C, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4)


def bank(*sites: str, channels: int = C) -> MemoryBankPlugin:
    return MemoryBankPlugin(channels, sites=sites or None, groups=4, entries=8)


def seem(*sites: str) -> SEEMPlugin:
    return SEEMPlugin(C, sites=sites or None, masks=MASKS)


def awake(model: PluggedModel) -> PluggedModel:
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def both(network: nn.Module | None = None) -> PluggedModel:
    return awake(attach(network or basicvsr(), seem=seem(), bank=bank("forward_output", "fused")))


def sample(b: int = 2, t: int = 3, h: int = 8, w: int = 12) -> tuple[Tensor, Tensor]:
    return torch.rand(b, t, 3, h, w), torch.rand(b, t, MASKS, h, w) > 0.5


def loss_of(model: Callable[..., Tensor], frames: Tensor, masks: Tensor) -> Tensor:
    context = Context(frames, masks=masks)
    out = model(frames, context)
    return out.square().mean() + sum(context.losses.values(), torch.zeros(()))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


class OneForAll(Plugin):
    """One module for every site, so no `at`."""

    default_sites = ("fused", "elsewhere")

    def __init__(self, channels: int, *, sites: Sequence[str] | None = None) -> None:
        super().__init__(channels, sites=sites)
        self.gain = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        return feature + self.gain * feature


def test_a_module_may_be_shared_by_all_sites() -> None:
    model = attach(basicvsr(), gain=OneForAll(C))
    assert model.plugins["gain"].sites == ("fused",)
    assert model.plugins["gain"].arguments == {"channels": C}


# What one does with a model


def test_a_deepcopy_is_independent() -> None:
    model, (frames, masks) = both(), sample()
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), 1.0)
    loss_of(twin, frames, masks).backward()
    optimizer.step()
    assert not any(torch.equal(p, before[f"plugins.{n}"]) for n, p in twin.plugins.named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert twin.plugins["seem"].arguments == {"channels": C, "sites": None, "masks": MASKS}


def test_unpickled_in_a_new_process(tmp_path: Path) -> None:
    model, (frames, masks) = both().eval(), sample()
    with torch.no_grad():
        expected = model(frames, Context(frames, masks=masks))
    torch.save((model, frames, masks, expected), tmp_path / "model.pt")
    script = textwrap.dedent(
        """
        import sys, torch
        from vsrplug import Context
        torch.set_num_threads(1)
        model, frames, masks, expected = torch.load(sys.argv[1], weights_only=False)
        with torch.no_grad():
            assert torch.equal(model(frames, Context(frames, masks=masks)), expected)
        assert model.detach("bank").arguments["entries"] == 8
        """
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_ema_copy_averages_and_runs() -> None:
    model, (frames, masks) = both().eval(), sample()
    averaged = AveragedModel(model, avg_fn=lambda mean, value, _: 0.5 * mean + 0.5 * value)
    averaged.update_parameters(model)
    first = copy.deepcopy(model.state_dict())
    awake(model)
    averaged.update_parameters(model)
    halfway = {key: 0.5 * (first[key] + value) for key, value in model.state_dict().items()}
    same(averaged.module.state_dict(), halfway)
    with torch.no_grad():
        ours = averaged(frames, Context(frames, masks=masks))
        model.load_state_dict(halfway)
        assert torch.equal(ours, model(frames, Context(frames, masks=masks)))


def test_functional_call_and_its_gradient() -> None:
    model, (frames, masks) = both(), sample(1, 2)
    other = awake(copy.deepcopy(model))
    weights = {name: p.detach() for name, p in other.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        def called(frames: Tensor, context: Context) -> Tensor:
            return torch.func.functional_call(model, parameters, (frames, context))

        return loss_of(called, frames, masks)

    functional = torch.func.grad(loss)(weights)
    loss_of(other, frames, masks).backward()
    same({k: v for k, v in functional.items() if k in gradients(other)}, gradients(other), rtol=1e-4, atol=1e-7)
    assert not gradients(model)


DDP = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from vsrplug import Context
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model, frames, masks = torch.load(f"{folder}/model.pt", weights_only=False)
parallel = DistributedDataParallel(model)
frames, masks = frames[rank::2], masks[rank::2]
for _ in range(2):  # the second pass would complain of parameters that the first left without gradient
    model.zero_grad()
    context = Context(frames, masks=masks)
    (parallel(frames, context).square().mean() + sum(context.losses.values())).backward()
torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/gradients{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    model, (frames, masks) = both(), sample(b=2)
    model.backbone.requires_grad_(False)
    torch.save((model, frames, masks), tmp_path / "model.pt")
    (tmp_path / "ddp.py").write_text(DDP, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "ddp.py"), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for rank in ranks:
        assert rank.communicate(timeout=120)[1] is not None
        assert rank.returncode == 0
    loss_of(model, frames, masks).backward()
    for rank in range(2):
        same(torch.load(tmp_path / f"gradients{rank}.pt"), gradients(model), rtol=1e-4, atol=2e-6)


def test_two_models_on_one_backbone() -> None:
    network, (frames, masks) = basicvsr().eval(), sample()
    plain = network(frames)
    first = awake(attach(network, bank=bank()))
    second = awake(attach(network, seem=seem(), bank=bank("fused")))
    ours, theirs = first(frames), second(frames, Context(frames, masks=masks))
    assert not torch.equal(ours, plain)
    assert not torch.equal(theirs, plain)
    first.detach("bank")
    assert torch.equal(first(frames), plain)
    assert torch.equal(second(frames, Context(frames, masks=masks)), theirs)
    assert torch.equal(network(frames), plain)
    assert not any("plugin" in key for key in network.state_dict())
    with pytest.raises(KeyError, match="there is no plug-in 'seam'; did you mean 'seem'"):
        second.detach("seam")


class Checkpointed(nn.Module):
    def __init__(self, trunk: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.trunk, self.reentrant = trunk, reentrant

    def forward(self, x: Tensor, refine: Callable[[Tensor], Tensor]) -> Tensor:
        return checkpoint(self.trunk, x, refine, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_around_a_trunk_with_sites(reentrant: bool) -> None:
    """A reentrant first pass has no gradient: its losses train nothing, of which it warns, and what sites share (SEEM's
    representation) cannot be run through twice, of which torch complains. Everything else is equal."""
    network, (frames, masks) = basicvsr(), sample()
    frames.requires_grad_()  # reentrant checkpointing wants an input with gradient
    plugins = {"bank": bank("forward_input", "backward_input")} | ({} if reentrant else {"seem": seem()})
    model = awake(attach(network, **plugins))
    rerun = copy.deepcopy(model)
    for way in ("forward_trunk", "backward_trunk"):
        setattr(rerun.backbone, way, Checkpointed(getattr(rerun.backbone, way), reentrant))
    results = []
    for each in (model, rerun):
        context, frames.grad = Context(frames, masks=masks), None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if reentrant else "error")
            loss = each(frames, context).square().mean()
            if not reentrant:
                loss = loss + sum(context.losses.values())
            loss.backward()
        grads = {name.replace("trunk.trunk", "trunk"): grad for name, grad in gradients(each).items()}
        results.append((grads, {"loss": loss, "frames": frames.grad, **context.losses}))
    (grads, values), (grads_again, values_again) = results
    assert values.keys() == {"loss", "frames", "bank/quantisation"}
    same(values, values_again)
    same(grads, grads_again, rtol=1e-4, atol=1e-7)
    assert {name.split(".")[1] for name in grads if name.startswith("plugins")} == set(plugins)


def test_reentrant_checkpointing_warns_of_the_loss() -> None:
    model = attach(basicvsr(), bank=bank("forward_input"))
    model.backbone.forward_trunk = Checkpointed(model.backbone.forward_trunk, True)
    with pytest.warns(UserWarning, match="the loss bank/quantisation was computed without gradient"):
        model(torch.rand(1, 2, 3, 8, 8, requires_grad=True))


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo remembers the sizes it saw at a line of code, and would compile for symbols in the next test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiles_with_a_context_from_outside_and_once_only() -> None:
    model, expected = both().eval(), []
    clips = [sample() for _ in range(2)]
    for frames, masks in clips:
        context = Context(frames, masks=masks)
        expected.append((model(frames, context), context.losses))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for first, (frames, masks), (out, losses) in zip((True, False), clips, expected, strict=True):
        context = Context(frames, masks=masks)
        with torch._dynamo.config.patch(error_on_recompile=not first):  # a new Context is no reason to compile again
            torch.testing.assert_close(compiled(frames, context), out, rtol=1e-4, atol=1e-5)
        same(context.losses, losses, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="used by an earlier pass"):
        compiled(frames, context)


def test_training_under_autocast_keeps_float32_gradients_and_losses() -> None:
    model, (frames, masks) = both(), sample()
    context = Context(frames, masks=masks)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(frames, context)
    assert context.losses["bank/quantisation"].dtype == torch.float32
    (out.float().square().mean() + context.losses["bank/quantisation"]).backward()
    for name, parameter in model.plugins.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_two_threads_run_one_model() -> None:
    model, clips = both().eval(), [sample() for _ in range(2)]
    expected = [model(frames, Context(frames, masks=masks)) for frames, masks in clips]
    found: list[list[Tensor]] = [[], []]

    def run(which: int) -> None:
        frames, masks = clips[which]
        with torch.no_grad():
            for _ in range(4):
                found[which].append(model(frames, Context(frames, masks=masks)))

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert len(found[which]) == 4
        assert all(torch.equal(out, expected[which]) for out in found[which])


def test_more_plugins_on_a_model_that_has_some() -> None:
    model, (frames, masks) = both().eval(), sample()
    expected = model(frames, Context(frames, masks=masks))
    more = attach(model.backbone, **model.plugins, new=bank("fused")).eval()
    assert list(more.plugins) == ["seem", "bank", "new"]
    assert torch.equal(more(frames, Context(frames, masks=masks)), expected)


def test_a_callable_is_given_the_width_of_its_sites() -> None:
    network = basicvsr()
    made = {
        "cls": partial(MemoryBankPlugin, groups=4),
        "named": partial(MemoryBankPlugin, groups=4, sites=["fused"]),
        "function": lambda channels: bank("forward_warped", channels=channels),
    }
    model = attach(network, **made)
    assert [model.plugins[name].channels for name in made] == [C] * 3
    assert model.plugins["cls"].sites == ("backward_output", "forward_output", "fused")
    assert model.plugins["named"].sites == ("fused",)
    assert set(model.plugins["cls"].at) == {"backward_output", "forward_output", "fused"}


def test_keywords_go_on_to_the_backbone() -> None:
    network = edvr().eval()
    frames = sample()[0]
    pyramid = network.extract(frames)
    assert torch.equal(attach(network, bank=bank())(frames, extracted=pyramid), network(frames))


# What is checked before anything changes


class ClipOnly(Plugin):
    """Serves clip sites only, and has no site by default."""

    kinds = ("clip",)

    def __init__(self, channels: int, *, sites: Any = None) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Conv2d(channels, channels, 1) for site in self.sites})

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        return feature


class Two(nn.Module):
    """A foreign network whose layers have different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.thin, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)


TWO_SITES = {"thin": ForeignSite("thin", 4, "clip"), "wide": ForeignSite("wide", 8, "clip")}

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown site": (
        lambda: {"bank": bank("forward_outptu")},
        ValueError,
        r"plug-in 'bank': there is no site 'forward_outptu'; did you mean 'forward_output' or .* Known: input, .*fused",
    ),
    "unknown site in a partial": (
        lambda: {"bank": partial(MemoryBankPlugin, sites=["fusd"], groups=4)},
        ValueError,
        r"plug-in 'bank': there is no site 'fusd'; did you mean 'fused'\? Known: input",
    ),
    "wrong kind": (
        lambda: {"it": ClipOnly(C, sites=("fused", "forward_output"))},
        ValueError,
        r"'it' \(ClipOnly\) serves clip sites, but 'forward_output' is a frame site\. Sites .* fit: input, fused\.",
    ),
    "wrong channels": (
        lambda: {"bank": bank("fused", channels=8)},
        ValueError,
        "'bank' was made with channels=8, but site 'fused' has 16; make it with channels=16, or give attach the class",
    ),
    "given twice": (
        lambda: dict.fromkeys(("one", "two"), bank("fused")),
        ValueError,
        "plug-ins 'one' and 'two' are one object; make two, or give one several sites",
    ),
    "no plug-in": (
        lambda: {"it": "seem"},
        TypeError,
        "'it' must be a plug-in or a callable channels -> Plugin, got str",
    ),
    "a module": (
        lambda: {"it": nn.Conv2d(C, C, 1)},
        TypeError,
        "'it' is the plain module Conv2d, which knows no sites; attach a Plugin that holds it",
    ),
    "callable makes no plug-in": (
        lambda: {"it": partial(nn.Conv2d, out_channels=C, kernel_size=1)},
        TypeError,
        "the callable for 'it' must return a Plugin, it returned Conv2d",
    ),
    "no default site here": (
        lambda: {"it": ClipOnly(C)},
        ValueError,
        r"plug-in 'it': none of its default sites \(it has none\) exists here; name some of input, .*fused with sites",
    ),
    "a string in a partial": (
        lambda: {"bank": partial(MemoryBankPlugin, sites="fused")},
        TypeError,
        r"sites is a sequence of names, got the string 'fused'; write sites=\('fused',\)",
    ),
    "a name torch has taken": (
        lambda: {"items": bank()},
        ValueError,
        "'items' cannot be the name of a plug-in: it takes",
    ),
    "the name of the backbone's own losses": (
        lambda: {"backbone": bank()},
        ValueError,
        "'backbone' cannot be the name of a plug-in: .* and not 'backbone', whose losses have that name",
    ),
    "a name with a dot": (lambda: {"a.b": bank()}, ValueError, r"'a\.b' cannot be the name of a plug-in"),
    "no foreign path": (
        lambda: {"bank": bank("x"), "sites": {"x": ForeignSite("fusin", C, "clip")}},
        ValueError,
        r"foreign site 'x': there is no submodule 'fusin'; did you mean 'fusion'",
    ),
    "foreign name taken": (
        lambda: {"bank": bank(), "sites": {"fused": ForeignSite("fusion", C, "clip")}},
        ValueError,
        r"BasicVSR has sites of its own named \['fused'\]; give foreign sites other names",
    ),
    "foreign name with a dot": (
        lambda: {"bank": bank(), "sites": {"a.b": ForeignSite("fusion", C, "clip")}},
        ValueError,
        r"a site's name is letters, digits and underscores, got 'a\.b'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_attach_refuses_and_leaves_everything_as_it_was(case: str) -> None:
    make, error, message = WRONG[case]
    network = basicvsr()
    good, given = bank(), make()  # default sites of the good one would be dropped by an attach that goes half way
    good.default_sites = sites = (*good.sites, "reference")
    states = [copy.deepcopy(network.state_dict()), *(copy.deepcopy(p.state_dict()) for p in plugins_of(given))]
    with pytest.raises(error, match=message):
        attach(network, good=good, **given)
    assert good.sites == sites[:-1]
    assert not good.sites_given
    after = [network.state_dict(), *(p.state_dict() for p in plugins_of(given))]
    for now, before in zip(after, states, strict=True):
        same(now, before)
    assert not any(module._forward_hooks for module in network.modules())


def plugins_of(given: dict[str, Any]) -> list[Plugin]:
    return [value for value in given.values() if isinstance(value, Plugin)]


def test_backbones_that_cannot_be_plugged() -> None:
    with pytest.raises(TypeError, match=r"has plug-ins already; write attach\(model.backbone, \*\*model.plugins, new="):
        attach(both(), bank=bank())
    with pytest.raises(TypeError, match=r'Sequential declares no sites; name some .* sites=\{"fused": ForeignSite\('):
        attach(nn.Sequential(nn.Conv2d(3, 3, 1)), bank=bank())
    with pytest.raises(
        ValueError, match=r"none of its default sites \(reference, .*\) exists here; name some of thin, w"
    ):
        attach(Two(), sites=TWO_SITES, seem=SEEMPlugin)
    with pytest.raises(
        ValueError, match=r"serve sites of different widths, \{'thin': 4, 'wide': 8\}; attach it once fo"
    ):
        attach(Two(), sites=TWO_SITES, it=ClipOnly)


@pytest.mark.parametrize(
    ("sites", "error", "message"),
    [
        ("fused", TypeError, r"sites is a sequence of names, got the string 'fused'; write sites=\('fused',\)"),
        ((), ValueError, r"sites names one place or more, each once, got \(\); None stands for the default sites"),
        (("fused", "fused"), ValueError, r"each once, got \('fused', 'fused'\)"),
    ],
)
def test_sites_of_a_plugin(sites: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryBankPlugin(C, sites=sites, groups=4)


def test_an_attached_plugin_is_not_cut_to_fit_another_backbone() -> None:
    network, (frames, masks) = edvr().eval(), sample()
    model = awake(attach(network, seem=seem()))
    expected = model(frames, Context(frames, masks=masks))
    with pytest.raises(ValueError, match="plug-in 'seem': there is no site 'reference'"):
        attach(basicvsr(), seem=model.plugins["seem"])
    assert model.plugins["seem"].sites == ("reference", "fused", "reconstructed")
    assert torch.equal(model(frames, Context(frames, masks=masks)), expected)


def test_passes_that_lack_something() -> None:
    model, (frames, masks) = both().eval(), sample()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"SEEM needs object masks: call model\(frames, Context\(frames, masks=\.\.\.\)\)"
    ):
        model(frames)
    with pytest.raises(ValueError, match=r"made for masks=5 planes a frame, the pass has 3; pad with zeros"):
        model(frames, Context(frames, masks=masks[:, :, :3]))
    with pytest.raises(ValueError, match=r"made for other frames than these; write model\(x, Context\(x, \.\.\.\)\)"):
        model(frames, Context(frames.clone(), masks=masks))
    context = Context(frames, masks=masks)
    model(frames, context)
    with pytest.raises(RuntimeError, match="used by an earlier pass; make a new one"):
        model(frames, context)
    same(model.state_dict(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 8, "kind": "window"}, "kind is 'window'; expected one of 'frame', 'clip'"),
        ({"channels": 0, "kind": "clip"}, "channels and stride are counts, got channels=0, stride=1"),
    ],
)
def test_a_site_is_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiteSpec(**arguments)
