"""`attach` puts plug-ins on a network without editing it; `PluggedModel` runs the two together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.foreign import ForeignSite, check_paths, hooked
from vsrplug.lora import base_state
from vsrplug.plugin import Plugin, checked_sites
from vsrplug.site import SiteSpec, unknown_name


class PluggedModel(nn.Module):
    """A backbone and the plug-ins on it. Made by `attach`; its keys are `backbone.*` and `plugins.<name>.*`.

    The backbone itself holds nothing of the plug-ins: `model.backbone(frames)` is always the plain network.

    Shape:
        frames: (b, t, 3, h, w) in [0, 1] -> what the backbone returns, (b, t_out, 3, s h, s w) for the native ones.
    """

    def __init__(self, backbone: nn.Module, plugins: Mapping[str, Plugin], foreign: Mapping[str, ForeignSite]) -> None:
        super().__init__()
        self.backbone = backbone
        self.plugins = nn.ModuleDict(plugins)
        self.foreign = dict(foreign)
        self.fingerprint = fingerprint(backbone)

    @property
    def sites(self) -> dict[str, SiteSpec]:
        """Every site a plug-in could have here: the backbone's own and the foreign ones."""
        return all_sites(self.backbone, self.foreign)

    def forward(self, frames: Tensor, context: Context | None = None, **keywords: Any) -> Tensor:
        """Run the backbone with the plug-ins.

        Args:
            frames: (b, t, 3, h, w) in [0, 1].
            context: a fresh `Context(frames, masks=...)` where plug-ins need more than frames, or whose losses are read
                afterwards.
            keywords: handed to the backbone.

        Raises:
            ValueError: the context belongs to other frames.
            RuntimeError: the context was used before.
        """
        if context is None:
            context = Context(frames)
        elif context.frames is not frames:
            raise ValueError("the context was made for other frames than these; write model(x, Context(x, ...))")
        plugins = cast("Mapping[str, Plugin]", self.plugins)
        routes: dict[str, list[tuple[str, Plugin]]] = {}
        for name, plugin in plugins.items():
            for site in plugin.sites:
                routes.setdefault(site, []).append((name, plugin))
        context.begin(routes, window=getattr(self.backbone, "window", None))
        # before prepare: sites will see padded features
        context.pad(getattr(self.backbone, "multiple", 1), getattr(self.backbone, "padding_mode", "replicate"))
        for plugin in plugins.values():
            plugin.prepare(context)
        foreign = {name: site for name, site in self.foreign.items() if name in routes}
        if not foreign and is_native(self.backbone):
            return self.backbone(frames, context, **keywords)
        with hooked(self.backbone, foreign, context):
            if is_native(self.backbone):
                return self.backbone(frames, context, **keywords)
            return self.backbone(frames, **keywords)

    def detach(self, name: str) -> Plugin:
        """Take a plug-in off and return it; the backbone was never changed.

        Raises:
            KeyError: no plug-in of that name is attached.
        """
        if name not in self.plugins:
            raise KeyError(unknown_name("plug-in", name, self.plugins))
        return cast(Plugin, self.plugins.pop(name))


def attach(
    backbone: nn.Module,
    /,
    *,
    sites: Mapping[str, ForeignSite] | None = None,
    **plugins: Plugin | Callable[[int], Plugin],
) -> PluggedModel:
    """Put plug-ins on a network without editing it; the result computes what the network computed until trained.

    The plug-ins move to the backbone's device, and are in train or eval mode as it is.

    Args:
        backbone: a native backbone (it has `.sites`), or any `nn.Module` together with `sites`.
        sites: name -> `ForeignSite`, places in a network that declares none.
        plugins: attach name -> a plug-in, or a callable `channels -> Plugin` such as a class or a
            `functools.partial`, which is given the width of the sites it will serve.

    Raises:
        ValueError, TypeError: unknown site, wrong kind, wrong channels, a plug-in given twice; one error that names
            what was given, expected and known, and nothing has been changed.

    Example:
        >>> model = attach(BasicVSR(), seem=SEEMPlugin, bank=MemoryBankPlugin(64, sites=("forward_output",)))
    """
    if isinstance(backbone, PluggedModel):
        raise TypeError("this model has plug-ins already; write attach(model.backbone, **model.plugins, new=...)")
    foreign = dict(sites or {})
    check_paths(backbone, foreign)
    known = all_sites(backbone, foreign)
    if not known:
        raise TypeError(
            f"{type(backbone).__name__} declares no sites; name some of its submodules with "
            'sites={"fused": ForeignSite("path.to.submodule", channels=..., kind=..., order=...)}'
        )
    for name in known:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"a site's name is letters, digits and underscores, got {name!r}")
    for name in plugins:
        if not re.fullmatch(r"\w+", name) or hasattr(nn.ModuleDict(), name) or name == "backbone":
            raise ValueError(
                f"{name!r} cannot be the name of a plug-in: it takes letters, digits and underscores, no attribute of "
                "torch's ModuleDict such as 'items' or 'training', and not 'backbone', whose losses have that name"
            )
    built = {name: _build(name, given, known, backbone) for name, given in plugins.items()}
    for name, plugin in built.items():
        twin = next((other for other in built if built[other] is plugin and other != name), None)
        if twin:
            raise ValueError(f"plug-ins {name!r} and {twin!r} are one object; make two, or give one several sites")
    kept = {name: _check(name, plugin, known) for name, plugin in built.items()}
    for name, plugin in built.items():  # everything was checked: only now is anything changed
        plugin.keep_sites(kept[name])
    model = PluggedModel(backbone, built, foreign)
    own = next(backbone.parameters(), None)
    if own is not None:
        model.plugins.to(own.device)
    model.plugins.train(backbone.training)  # but not model.train(): parts of the backbone may be in eval on purpose
    model.training = backbone.training
    return model


def is_native(network: nn.Module) -> bool:
    """Whether the network declares sites, and so takes a Context beside the frames."""
    return isinstance(getattr(network, "sites", None), Mapping)


def all_sites(backbone: nn.Module, foreign: Mapping[str, ForeignSite]) -> dict[str, SiteSpec]:
    """Name -> spec, of the backbone's own sites and the foreign ones."""
    own = dict(backbone.sites) if is_native(backbone) else {}  # type: ignore[arg-type]
    twice = sorted(own.keys() & foreign.keys())
    if twice:
        raise ValueError(
            f"{type(backbone).__name__} has sites of its own named {twice}; give foreign sites other names"
        )
    return own | {name: site.spec for name, site in foreign.items()}


def fingerprint(backbone: nn.Module) -> dict[str, str]:
    """Key -> digest of each entry of the state dict: which backbone this is, and what changed since.

    Low-rank layers (`vsrplug.lora`) make no difference to it.
    """
    return digests(base_state(backbone))


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Key -> digest of the bytes of each tensor."""
    prints = {}
    for key, value in state.items():
        array = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        prints[key] = hashlib.blake2b(array.data, digest_size=8).hexdigest()
    return prints


def _build(
    name: str, given: Plugin | Callable[[int], Plugin], known: Mapping[str, SiteSpec], backbone: nn.Module
) -> Plugin:
    """The plug-in itself, or what the callable makes for the width of the sites it will serve."""
    if isinstance(given, Plugin):
        return given
    if isinstance(given, nn.Module):
        raise TypeError(
            f"{name!r} is the plain module {type(given).__name__}, which knows no sites; attach a Plugin that "
            "holds it, as SEEMPlugin holds SEEM"
        )
    if not callable(given):
        raise TypeError(f"{name!r} must be a plug-in or a callable channels -> Plugin, got {type(given).__name__}")
    named = given.keywords.get("sites") if isinstance(given, partial) else None
    if named is not None:
        for site in checked_sites(named):
            if site not in known:
                raise ValueError(f"plug-in {name!r}: " + unknown_name("site", site, known))
    default = getattr(given.func if isinstance(given, partial) else given, "default_sites", ())
    wanted = tuple(named or default or known)
    widths = {site: known[site].channels for site in wanted if site in known}
    if len(set(widths.values())) > 1 and not (named or default) and hasattr(backbone, "channels"):
        widths = {"": backbone.channels}  # type: ignore[dict-item]
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"plug-in {name!r} would serve sites of different widths, {widths}; attach it once for each width, made "
            "with its channels and sites"
        )
    if not widths:
        raise ValueError(_no_default(name, wanted, known))
    plugin = given(next(iter(widths.values())))
    if not isinstance(plugin, Plugin):
        raise TypeError(f"the callable for {name!r} must return a Plugin, it returned {type(plugin).__name__}")
    return plugin


def _check(name: str, plugin: Plugin, known: Mapping[str, SiteSpec]) -> tuple[str, ...]:
    """The sites the plug-in will have, or an error."""
    if not plugin.sites_given:
        sites = plugin.choose_sites(known)
        if not sites:
            raise ValueError(_no_default(name, plugin.sites, known))
    else:
        sites = plugin.sites
    for site in sites:
        if site not in known:
            raise ValueError(f"plug-in {name!r}: " + unknown_name("site", site, known))
        spec = known[site]
        if spec.kind not in plugin.kinds:
            fitting = [s for s, other in known.items() if other.kind in plugin.kinds] or ["none"]
            raise ValueError(
                f"plug-in {name!r} ({type(plugin).__name__}) serves {' and '.join(plugin.kinds)} sites, but {site!r} "
                f"is a {spec.kind} site. Sites here that would fit: {', '.join(fitting)}."
            )
        if spec.channels != plugin.channels:
            raise ValueError(
                f"plug-in {name!r} was made with channels={plugin.channels}, but site {site!r} has {spec.channels}; "
                f"make it with channels={spec.channels}, or give attach the class and it will"
            )
    return sites


def _no_default(name: str, wanted: tuple[str, ...], known: Mapping[str, SiteSpec]) -> str:
    return (
        f"plug-in {name!r}: none of its default sites ({', '.join(wanted) or 'it has none'}) exists here; name some of "
        f"{', '.join(known)} with sites=(...)"
    )
