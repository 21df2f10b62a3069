"""Maps: what plug-ins do in a pass, as pictures. They are taken from outside, and cost nothing while nobody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vsrplug.plugged import PluggedModel
from vsrplug.plugin import Plugin

Maps = dict[str, dict[str, Tensor]]  # picture -> title of a plane -> plane, see `Plugin.maps`


@contextmanager
def recorded(network: nn.Module, frame: int, pixel: tuple[int, int]) -> Iterator[Maps]:
    """Within, one call of the network leaves the maps of its plug-ins in the dictionary.

    Modules of the backbone itself are asked too where it is a window network and they have a method `maps`, as the
    fusion of `STVUN` and the attention of `MANA` do. Nothing is kept on any of them.

    Args:
        network: a `PluggedModel`, or a `SlidingWindow` around one, in eval mode. Of any other nothing is recorded.
        frame: which one of the clip that the network is given.
        pixel: row and column in that frame, of which attention is shown.

    Yields:
        `"<attach name>, <picture>"` -> title -> plane, of the first clip of the batch, on the CPU and without what the
        network padded; the backbone's own are `"backbone, <picture>"`. What a site that is called several times for a
        frame shows is that of its last call.

    Example:
        >>> with torch.no_grad(), recorded(model, frame=3, pixel=(12, 20)) as maps:
        ...     model(frames)
        >>> list(maps["efst, confidence at fused"])
        ['frame -2', 'frame -1', 'this frame', 'frame +1', 'frame +2']
    """
    found: Maps = {}
    model = next((module for module in network.modules() if isinstance(module, PluggedModel)), None)
    if model is None:
        yield found
        return
    windows = isinstance(getattr(model.backbone, "window", None), int)
    size, place, passes = (1, 1), frame, 0

    def begin(_: nn.Module, given: tuple[Any, ...]) -> None:
        nonlocal size, passes
        size, passes = given[0].shape[-2:], 0

    def begin_pass(_: nn.Module, given: tuple[Any, ...]) -> None:
        nonlocal place, passes
        place, passes = given[0].shape[1] // 2 if windows else frame, passes + 1

    def look(name: str, module: Any, given: tuple[Any, ...], keywords: dict[str, Any], _: Tensor) -> None:
        feature, t = given[0], keywords.get("t")
        another_window = network is not model and passes != frame + 1  # a SlidingWindow's are in order
        if another_window or (feature.ndim == 4 and t not in (None, place)):
            return
        padded = given[1].frames.shape[-2:] if isinstance(module, Plugin) else size
        row, column = (at * there // all_ for at, there, all_ in zip(pixel, feature.shape[-2:], padded, strict=True))
        for picture, planes in module.maps(*given, at=(place, row, column), **keywords).items():
            found[f"{name}, {picture}"] = {title: _cut(plane, size, padded) for title, plane in planes.items()}

    asked: list[tuple[str, nn.Module]] = list(model.plugins.items())
    if windows:
        asked += [("backbone", module) for module in model.backbone.modules() if hasattr(module, "maps")]
    handles = [network.register_forward_pre_hook(begin), model.register_forward_pre_hook(begin_pass)]
    handles += [module.register_forward_hook(partial(look, name), with_kwargs=True) for name, module in asked]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def over_time(planes: Tensor, now: int) -> dict[str, Tensor]:
    """Planes (n, h, w), one a frame, by their distance from frame `now`: `"frame -1"`, `"this frame"`, `"frame +1"`."""
    return {f"frame {i - now:+d}" if i != now else "this frame": plane for i, plane in enumerate(planes)}


def at_site(maps: Maps, site: str) -> Maps:
    """The maps of a plain module as those of a plug-in, which may have several: each with the site's name."""
    return {f"{picture} at {site}": planes for picture, planes in maps.items()}


def _cut(plane: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """The plane, of any resolution, without the rows and columns that were added at the bottom and right."""
    rows, columns = (-(-n * own // all_) for n, own, all_ in zip(plane.shape[-2:], size, padded, strict=True))
    return plane[..., :rows, :columns].detach().cpu().clone()
