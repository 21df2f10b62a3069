"""The base class of everything that can be attached: `Plugin`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vsrplug.site import Kind, SiteSpec

if TYPE_CHECKING:
    from vsrplug.context import Context
    from vsrplug.maps import Maps


class Plugin(nn.Module, ABC):
    """A shape-keeping module that refines features at one or more sites of a backbone.

    A subclass keeps one plain module a site in the `nn.ModuleDict` `self.at`, made for every name in `self.sites`, so
    that `attach` can drop those of default sites that a backbone lacks; where all sites share a module it needs none.
    Nothing that belongs to one call stays on `self`: what sites share goes to `context.memo`.

    Args:
        channels: width of the features it serves.
        sites: names of sites; None means those of `default_sites` that the backbone has.
    """

    default_sites: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[Kind, ...]] = ("frame", "clip")

    arguments: dict[str, Any]  # the constructor's arguments as given: what a plug-in file records
    at: nn.ModuleDict

    def __new__(cls, *args: Any, **kwargs: Any) -> Plugin:
        """Record the constructor's arguments, whatever the subclass does with them."""
        plugin = super().__new__(cls)
        itself = next(iter(inspect.signature(cls.__init__).parameters))  # `self`, by whatever name
        # bind_partial: copy and unpickle call __new__ without arguments and restore `arguments` themselves.
        bound = inspect.signature(cls.__init__).bind_partial(plugin, *args, **kwargs)
        # What a subclass takes as **keywords is recorded by its own names, so that the constructor can be called again.
        given = {name: value for name, value in bound.arguments.items() if name not in (itself, _open(cls))}
        object.__setattr__(plugin, "arguments", given | bound.arguments.get(_open(cls), {}))
        return plugin

    def __init__(self, channels: int, *, sites: Sequence[str] | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.sites_given = sites is not None
        self.sites: tuple[str, ...] = self.default_sites if sites is None else checked_sites(sites)

    def choose_sites(self, known: Mapping[str, SiteSpec]) -> tuple[str, ...]:
        """Those of the default sites that a backbone with the sites `known` has."""
        return tuple(site for site in self.default_sites if site in known)

    def keep_sites(self, sites: Sequence[str]) -> None:
        """Keep only the modules of `sites`; `attach` calls it with those of the default sites that exist.

        From then on they count as given: on another backbone they must all exist, none is dropped again.
        """
        modules = self._modules.get("at")
        for site in set(self.sites) - set(sites):
            if isinstance(modules, nn.ModuleDict) and site in modules:
                del modules[site]
        self.sites = tuple(site for site in self.sites if site in sites)
        self.sites_given = True

    def prepare(self, context: Context) -> None:
        """Once a pass, before the backbone: compute what the sites share, complain of what is missing."""

    @abstractmethod
    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine a feature, (b, c, h, w) or (b, t, c, h, w) by the site's kind; same shape and dtype out."""

    def maps(
        self,
        feature: Tensor,
        context: Context,
        *,
        site: str,
        at: tuple[int, int, int],
        t: int | None = None,
        **given: Any,
    ) -> Maps:
        """What it does at a site, as pictures; none unless a subclass has some.

        `vsrplug.maps.recorded` calls it right after `forward`, with the same arguments; nobody else does.

        Args:
            feature, context, site, t, given: as in `forward`.
            at: the frame to show, of the feature's clip or, at a frame site, of the window; and row and column in the
                feature, of the pixel whose attention is shown.

        Returns:
            Picture -> title -> plane, of the first clip of the batch. Planes are values (h, w), floating; numbers of
            things (h, w), int64; or masks over the frame (m, h, w), bool. They cover the whole feature, at any
            resolution.
        """
        return {}


def checked_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        TypeError: a string, whose letters would be taken for names.
        ValueError: none, or one of them twice.
    """
    if isinstance(sites, str):
        raise TypeError(f"sites is a sequence of names, got the string {sites!r}; write sites=({sites!r},)")
    if not sites or len(set(sites)) < len(sites):
        raise ValueError(
            f"sites names one place or more, each once, got {tuple(sites)}; None stands for the default sites"
        )
    return tuple(sites)


def _open(cls: type[Plugin]) -> str:
    """The name of the constructor's `**keywords`, or an empty string."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
