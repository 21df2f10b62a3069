"""Networks that are not ours, attached by submodule path: which frame a call belongs to, hooks that leave no trace."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vsrplug import Context, ForeignSite, PluggedModel, Plugin, attach
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin

C, MASKS, T = 8, 3, 3


class Recurrent(nn.Module):
    """Runs from the last frame to the first, calling `cell` once a frame."""

    order = "backward"

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Conv2d(3 + C, C, 3, padding=1)
        self.last = nn.Conv2d(C, 3, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        state = frames.new_zeros(len(frames), C, *frames.shape[-2:])
        out = []
        for t in range(frames.shape[1]) if self.order == "forward" else reversed(range(frames.shape[1])):
            state = torch.tanh(self.cell(torch.cat([frames[:, t], state], 1)))
            out.append(self.last(state))
        return torch.stack(out if self.order == "forward" else out[::-1], 1)


class Forward(Recurrent):
    order = "forward"


class Folded(nn.Module):
    """Calls `features` once, with all frames in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.Tanh(), nn.Conv2d(C, C, 3, padding=1))
        self.last = nn.Conv2d(C, 3, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.last(torch.tanh(self.features(frames.flatten(0, 1)))).unflatten(0, frames.shape[:2])


class Window(nn.Module):
    """Gives the centre frame of a window, calling `fusion` once."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = nn.Conv2d(T * 3, C, 3, padding=1)
        self.last = nn.Conv2d(C, 3, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.last(torch.tanh(self.fusion(frames.flatten(1, 2)))).unsqueeze(1)


class Recorder(Plugin):
    """Keeps what it was given, in a list that the test owns."""

    def __init__(self, seen: list[tuple[int | None, Tensor]]) -> None:
        super().__init__(C, sites=("here",))
        self.seen = seen

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        self.seen.append((t, feature.detach().clone()))
        return feature


NETWORKS: dict[str, tuple[Callable[[], nn.Module], ForeignSite, list[int | None]]] = {
    "backward": (Recurrent, ForeignSite("cell", C, "frame", order="backward"), [2, 1, 0]),
    "forward": (Forward, ForeignSite("cell", C, "frame", order="forward"), [0, 1, 2]),
    "folded": (Folded, ForeignSite("features.2", C, "clip"), [None]),
    "window": (Window, ForeignSite("fusion", C, "frame", order="centre"), [1]),
}
EACH = pytest.mark.parametrize("name", NETWORKS)


def plugged(name: str, *, network: nn.Module | None = None, **plugins: Plugin) -> PluggedModel:
    make, site, _ = NETWORKS[name]
    return attach(network or make(), sites={"here": site}, **plugins)


def seem(representation: int = C) -> SEEMPlugin:
    return SEEMPlugin(C, sites=("here",), masks=MASKS, representation=representation)


def bank() -> MemoryBankPlugin:
    return MemoryBankPlugin(C, sites=("here",), groups=4, entries=6)


def awake(model: PluggedModel) -> PluggedModel:
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clip(t: int = T) -> tuple[Tensor, Tensor]:
    return torch.rand(2, t, 3, 6, 7), (torch.rand(2, t, MASKS, 6, 7) > 0.5).float()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@EACH
def test_identity_then_training_then_detach(name: str) -> None:
    network = NETWORKS[name][0]().requires_grad_(False)
    frames, masks = clip()
    plain = network(frames)
    before = copy.deepcopy(network.state_dict())
    model = plugged(name, network=network, seem=seem(), bank=bank())
    assert torch.equal(model(frames, Context(frames, masks=masks)), plain)
    started = {key: p.detach().clone() for key, p in model.plugins.named_parameters()}
    optimizer = torch.optim.Adam(model.plugins.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        context = Context(frames, masks=masks)
        (model(frames, context).square().mean() + sum(context.losses.values())).backward()
        optimizer.step()
    assert not [key for key, p in model.plugins.named_parameters() if torch.equal(p, started[key])]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    trained = model(frames, Context(frames, masks=masks))
    assert not torch.equal(trained, plain)
    assert torch.equal(network(frames), plain)
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "plugins"}
    model.detach("seem")
    assert not torch.equal(model(frames), plain)
    model.detach("bank")
    assert torch.equal(model(frames), plain)


@EACH
def test_each_call_is_given_its_frame(name: str) -> None:
    network = NETWORKS[name][0]()
    outputs: list[Tensor] = []
    handle = network.get_submodule(NETWORKS[name][1].path).register_forward_hook(
        lambda *a: outputs.append(a[2].clone())
    )
    frames, _ = clip()
    seen: list[tuple[int | None, Tensor]] = []
    plugged(name, network=network, it=Recorder(seen))(frames)
    handle.remove()
    assert [t for t, _ in seen] == NETWORKS[name][2]
    for (_, feature), output in zip(seen, outputs, strict=True):
        assert torch.equal(feature, output.unflatten(0, (2, T)) if name == "folded" else output)


@EACH
def test_each_frame_meets_its_own_masks(name: str) -> None:
    """Other masks at one frame change the feature of that frame and of no other."""
    frames, masks = clip()
    seen: list[tuple[int | None, Tensor]] = []
    model = awake(plugged(name, seem=seem(), it=Recorder(seen)))
    # what the state carries over from the frame before would change as well, so the cell does not see it
    with torch.no_grad():
        if isinstance(model.backbone, Recurrent):
            model.backbone.cell.weight[:, 3:] = 0

    def features(masks: Tensor) -> dict[int, Tensor]:
        seen.clear()
        model(frames, Context(frames, masks=masks))
        return {t: f[:, t] for t in range(T) for _, f in seen} if name == "folded" else {t or 0: f for t, f in seen}

    reference = features(masks)
    for t in range(T):
        other = masks.clone()
        other[:, t] = 1 - other[:, t]
        changed = {at for at, feature in features(other).items() if not torch.equal(feature, reference[at])}
        assert changed == {t} & reference.keys()


@EACH
def test_no_hook_outside_a_pass(name: str) -> None:
    model = plugged(name, bank=bank(), it=Recorder(seen := []))
    inside = []
    model.plugins["it"].register_forward_hook(lambda *_: inside.append(hooks(model.backbone)))
    frames, _ = clip()
    assert hooks(model.backbone) == 0
    model(frames)
    assert set(inside) == {1}
    assert hooks(model.backbone) == 0
    model.plugins["it"].forward = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(frames)
    assert hooks(model.backbone) == 0
    calls = len(seen)
    model.backbone(frames)
    assert len(seen) == calls


@EACH
def test_copies_and_pickles(name: str) -> None:
    model = awake(plugged(name, seem=seem(), bank=bank()))
    frames, masks = clip()
    expected = model(frames, Context(frames, masks=masks))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(frames, Context(frames, masks=masks)), expected)
        twin.detach("seem")
    assert torch.equal(model(frames, Context(frames, masks=masks)), expected)


def test_unpickled_in_a_new_process(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Flatten(0, 1), nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 3, 1), nn.Unflatten(0, (2, T))
    )
    model = awake(attach(network, sites={"here": ForeignSite("1", C, "clip")}, bank=bank()))
    frames, _ = clip()
    torch.save((model, frames, model(frames).detach()), tmp_path / "model.pt")
    script = (
        "import sys, torch\ntorch.set_num_threads(1)\n"
        "model, frames, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(frames), expected)\nassert not torch.equal(model.backbone(frames), expected)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_threads_run_one_network() -> None:
    """Plugged in one thread, plugged otherwise in the next, plain in the third."""
    network = Recurrent().eval()
    frames, _ = clip()
    models: list[nn.Module] = [
        awake(plugged("backward", network=network, bank=bank())),
        awake(plugged("backward", network=network, bank=bank())),
        network,
    ]
    expected = [model(frames) for model in models]
    assert not torch.equal(expected[0], expected[1])
    wrong: list[int] = []
    start = threading.Barrier(len(models))

    def run(which: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(models[which](frames), expected[which]):
                    wrong.append(which)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=run, args=(which,)) for which in range(len(models))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert hooks(network) == 0


def test_sites_with_nothing_attached_are_left_alone() -> None:
    sites = {"here": ForeignSite("cell", C, "frame", order="backward"), "wrong": ForeignSite("last", 99, "clip")}
    model = attach(Recurrent(), sites=sites, bank=bank())
    frames, _ = clip()
    assert torch.equal(model(frames), model.backbone(frames))
    assert set(model.sites) == {"here", "wrong"}


def test_a_native_backbone_may_have_foreign_sites_too() -> None:
    from vsrplug.backbones import EDVR

    network = EDVR(C, frames=T, extract_blocks=1, reconstruct_blocks=1, deform_groups=4).eval()
    sites = {"block": ForeignSite("reconstruction.0", C, "frame", order="centre")}
    frames, _ = clip()
    model = attach(network, sites=sites, bank=MemoryBankPlugin(C, sites=("block", "fused"), groups=4))
    assert torch.equal(model(frames), network(frames))
    assert not torch.equal(awake(model)(frames), network(frames))


class Odd(nn.Module):
    """A network with one call that a site cannot serve: `here` is what it calls, as the test says."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], here: nn.Module | None = None) -> None:
        super().__init__()
        self.here = here or nn.Conv2d(3, C, 1)
        self.call = call

    def forward(self, frames: Tensor) -> Tensor:
        return self.call(self.here, frames)


class Pair(nn.Module):
    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        return frame, frame


def frame_by_frame(here: nn.Module, frames: Tensor) -> Tensor:
    return torch.stack([here(frame) for frame in frames.unbind(1)], 1)


def folded(here: nn.Module, frames: Tensor) -> Tensor:
    return here(frames.flatten(0, 1))


def without_calling(here: nn.Module, frames: Tensor) -> Tensor:
    return nn.functional.conv2d(frames.flatten(0, 1), here.weight, here.bias)


FORWARD, CENTRE, CLIP = (
    ForeignSite("here", C, "frame", order="forward"),
    ForeignSite("here", C, "frame", order="centre"),
    ForeignSite("here", C, "clip"),
)
WHERE = r"foreign site 'here' \(submodule 'here'\): "
ODD: dict[str, tuple[nn.Module, ForeignSite, type[Exception], str]] = {
    "too often": (
        Odd(lambda here, frames: frame_by_frame(here, torch.cat([frames, frames], 1))),
        FORWARD,
        RuntimeError,
        "called more than 3 times for 3 frames; order='forward' expects one call a frame",
    ),
    "too seldom": (
        Odd(lambda here, frames: frame_by_frame(here, frames[:, 1:])),
        FORWARD,
        RuntimeError,
        "called 2 times, not 3 times for 3 frames; order='forward' expects one call a frame",
    ),
    "centre called once a frame": (
        Odd(frame_by_frame),
        CENTRE,
        RuntimeError,
        "called more than once for 3 frames; order='centre' expects one call a pass",
    ),
    "never called": (
        Odd(without_calling),
        CLIP,
        RuntimeError,
        "called 0 times, not once for 3 frames; kind='clip' expects one call a pass. A submodule whose weights",
    ),
    "wrong channels": (
        Odd(folded, nn.Conv2d(3, 5, 1)),
        CLIP,
        ValueError,
        "declared with channels=8, but the submodule returned 5",
    ),
    "a tuple": (
        Odd(lambda here, frames: here(frames)[0], Pair()),
        CLIP,
        TypeError,
        r"the submodule must return one 4-D tensor \(b, c, h, w\), it returned tuple",
    ),
    "five dimensions": (
        Odd(lambda here, frames: here(frames), nn.Identity()),
        CLIP,
        TypeError,
        r"the submodule must return one 4-D tensor \(b, c, h, w\), it returned \(2, 3, 3, 6, 7\)",
    ),
    "clip site called once a frame": (
        Odd(frame_by_frame),
        CLIP,
        ValueError,
        r"a clip site folds b\*t = 2\*3 frames into the batch, it got 2; .* once a frame is a site of kind=\"frame\"",
    ),
    "frame site with all frames": (
        Odd(folded),
        CENTRE,
        ValueError,
        'a frame site is called with one time step, a batch of 2, it got 6; .* is a site of kind="clip"',
    ),
    **{
        f"checkpointing, use_reentrant={reentrant}": (
            Odd(lambda here, frames, r=reentrant: checkpoint(here, frames.flatten(0, 1), use_reentrant=r)),
            CLIP,
            RuntimeError,
            "the submodule runs under gradient checkpointing, which would repeat it .* without its plug-ins. Switch ch",
        )
        for reentrant in (True, False)
    },
}


@pytest.mark.parametrize("case", ODD)
def test_calls_that_a_site_cannot_serve(case: str) -> None:
    network, site, error, message = ODD[case]
    model = attach(network, sites={"here": site}, bank=bank())
    frames, _ = clip()
    with pytest.raises(error, match=WHERE + message):
        model(frames.requires_grad_())
    assert hooks(model) == 0
    model.detach("bank")
    assert torch.equal(model(frames), network(frames))


def test_checkpointing_around_the_whole_model_is_fine() -> None:
    model = awake(plugged("backward", bank=bank()))
    frames, _ = clip()
    frames.requires_grad_()
    model(frames).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, frames, use_reentrant=False).square().mean().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cell", C, "frame"),
            r"a frame site needs order, one of 'forward', 'backward', 'centre', .* 'cell' .* got None",
        ),
        (("cell", C, "frame", "center"), "got 'center'"),
        (("cell", C, "both"), "kind is 'both'; expected one of 'frame', 'clip'"),
        (("cell", 0, "clip"), "channels and stride are counts, got channels=0"),
    ],
)
def test_a_foreign_site_is_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForeignSite(*arguments)
