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


class Plugin(nn.Module, ABC):
    """A shape-keeping module that refines features at one or more sites of a backbone.

    A subclass keeps one plain module a site in the `nn.ModuleDict` `self.at`, made for every name in `self.sites`, so
    that `attach` can drop those of default sites that a backbone lacks. Nothing that belongs to one call stays on
    `self`: what sites share goes to `context.memo`.

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
        # bind_partial: copy and unpickle call __new__ without arguments and restore `arguments` themselves.
        bound = inspect.signature(cls.__init__).bind_partial(plugin, *args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        object.__setattr__(plugin, "arguments", given)
        return plugin

    def __init__(self, channels: int, *, sites: Sequence[str] | None = None) -> None:
        super().__init__()
        if isinstance(sites, str):
            raise TypeError(f"sites is a sequence of names, got the string {sites!r}; write sites=({sites!r},)")
        self.channels = channels
        self.sites_given = sites is not None
        self.sites: tuple[str, ...] = self.default_sites if sites is None else tuple(sites)

    def choose_sites(self, known: Mapping[str, SiteSpec]) -> tuple[str, ...]:
        """Those of the default sites that a backbone with the sites `known` has."""
        return tuple(site for site in self.default_sites if site in known)

    def keep_sites(self, sites: Sequence[str]) -> None:
        """Keep only the modules of `sites`; `attach` calls it with those of the default sites that exist."""
        for site in set(self.sites) - set(sites):
            del self.at[site]
        self.sites = tuple(site for site in self.sites if site in sites)

    def prepare(self, context: Context) -> None:
        """Once a pass, before the backbone: compute what the sites share, complain of what is missing."""

    @abstractmethod
    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine a feature, (b, c, h, w) or (b, t, c, h, w) by the site's kind; same shape and dtype out."""
