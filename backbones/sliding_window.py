"""`SlidingWindow`: a network that restores the centre of a window, as one that restores a clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.plugged import PluggedModel
from vsrplug.site import SiteSpec

from .pcd_alignment import Pyramid

Features = Tensor | Pyramid  # what a network's `extract` returns
Padding = Literal["replicate", "reflection", "reflection_circle", "circle"]


class SlidingWindow(nn.Module):
    """Moves a window network along a clip: one SR frame for every frame.

    Each frame's features are extracted once, by the network's `extract`, and the windows share them; while a plug-in
    sits at `input` or `features` (it may look at the whole window), or anywhere in a network as a `ForeignSite`, or the
    network has no `extract`, every window is computed by itself. Both give the same result. Features are kept for one
    window, so memory does not grow with the clip but for the result.

    Every window is a pass of its own: its Context has the window's frames and masks (and target, and the key frames as
    they are), and `t` at its sites counts from the start of the window. Auxiliary losses are averaged over the windows
    into the clip's context.

    Put plug-ins on the network, not on this: `SlidingWindow(attach(EDVR(), seem=SEEMPlugin))`.

    Args:
        model: a network with a `window`, such as `EDVR`, or a `PluggedModel` around one.
        padding: what stands in for frames beyond the ends, see `window_indices`. Results published by BasicSR and
            mmagic on REDS4 and Vid4 use "reflection_circle".

    Raises:
        TypeError: the model is no window network.
        ValueError: an unknown padding.
    """

    window = None
    multiple = 1

    def __init__(self, model: nn.Module, padding: Padding = "reflection_circle") -> None:
        super().__init__()
        if padding not in get_args(Padding):
            raise ValueError(f"padding is {padding!r}; expected one of {', '.join(map(repr, get_args(Padding)))}")
        network = model.backbone if isinstance(model, PluggedModel) else model
        if not isinstance(getattr(network, "window", None), int):
            raise TypeError(
                f"SlidingWindow needs a network with a window, such as EDVR, got {type(network).__name__}; a recurrent "
                "network takes clips of any length as it is"
            )
        self.model = model
        self.padding: Padding = padding
        self.scale: int = network.scale  # type: ignore[assignment]
        self.channels: int = network.channels  # type: ignore[assignment]

    @property
    def sites(self) -> dict[str, SiteSpec]:
        """Those of the model, where its own plug-ins are."""
        return self.model.sites  # type: ignore[return-value]

    @property
    def times(self) -> tuple[float, ...]:
        """Those of the network, where it makes frames in between."""
        return self._network.times  # type: ignore[return-value]

    def forward(self, frames: Tensor, context: Context | None = None, **keywords: Any) -> Tensor:
        """Super-resolve every frame.

        Args:
            frames: (b, t, 3, h, w) in [0, 1].
            context: a fresh `Context(frames, masks=...)` where plug-ins need more than frames, or whose losses are read
                afterwards.
            keywords: handed to the network with every window, such as the `times` of `STVUN`.

        Returns:
            (b, t, 3, s h, s w), not clamped; n t frames, in order of time, where the network gives n for each window.

        Raises:
            ValueError: a clip too short for the padding, or the context belongs to other frames.
            RuntimeError: the context was used before.
        """
        network: Any = self._network
        windows = window_indices(frames.shape[1], network.window, self.padding)
        context = Context(frames) if context is None else context
        if context.frames is not frames:
            raise ValueError("the context was made for other frames than these; write model(x, Context(x, ...))")
        plugins = self.model.plugins if isinstance(self.model, PluggedModel) else nn.ModuleDict()
        try:
            context.begin({"window": tuple(plugins.items())})  # type: ignore[arg-type]
        except RuntimeError as error:
            raise RuntimeError(
                "SlidingWindow was given a Context that is in use. Make a new one for every call; and to attach "
                "plug-ins, wrap the plugged model, not the other way round: SlidingWindow(attach(network, ...))"
            ) from error
        padded = context.pad(network.multiple)
        shared = self._shares_features()
        known: dict[int, Features] = {}  # frame -> features, of the frames in reach of the window
        restored = []
        for t, window in enumerate(windows):
            passed = Context(padded[:, window], _cut(context.masks, window), context.keys, _cut(context.target, window))
            given = dict(keywords)
            if shared:
                known = {frame: features for frame, features in known.items() if frame in window}
                given["extracted"] = _window_features(network, padded, window, known)
            restored.append(self.model(passed.frames, passed, **given))
            for name, value in passed.losses.items():
                attached, loss = name.split("/", 1)
                own = None if attached == "backbone" else plugins[attached]
                context.add_loss(own, loss, value, site="window", t=t)  # type: ignore[arg-type]
        h, w = frames.shape[-2:]
        return torch.cat(restored, dim=1)[..., : h * self.scale, : w * self.scale]

    @property
    def _network(self) -> nn.Module:
        return self.model.backbone if isinstance(self.model, PluggedModel) else self.model

    def _shares_features(self) -> bool:
        """Whether windows may share features: the network can extract them, and no plug-in would have a say in it."""
        if not hasattr(self._network, "extract"):
            return False
        if not isinstance(self.model, PluggedModel):
            return True
        taken = {site for plugin in self.model.plugins.values() for site in plugin.sites}  # type: ignore[union-attr]
        return not (taken & {"input", "features"} or taken & self.model.foreign.keys())


def window_indices(count: int, window: int, padding: Padding) -> list[list[int]]:
    """The frames of each window of a clip, `count` lists of `window` indices, the centre of list t being t.

    Beyond an end, a window of 5 at frame 0 has: `"replicate"` 0 0 [0] 1 2, `"reflection"` 2 1 [0] 1 2,
    `"reflection_circle"` 4 3 [0] 1 2 (the frames that follow the window, in reverse), `"circle"` 3 4 [0] 1 2 (the same
    frames in order); at the last frame the mirror image of it, as in BasicSR.

    Raises:
        ValueError: fewer frames than the padding needs: 1 for replicate, half a window and one for reflection, a window
            for the circles.
    """
    half, last = window // 2, count - 1
    needed = {"replicate": 1, "reflection": half + 1}.get(padding, window)
    if count < needed:
        smaller = "'reflection' or 'replicate'" if half < count else "'replicate'"
        raise ValueError(
            f"the clip has {count} frames and the window {window}: padding={padding!r} needs {needed} at least; give a "
            f"longer clip, or SlidingWindow(..., padding=...) with {smaller}"
        )
    windows = []
    for centre in range(count):
        indices = []
        for frame in range(centre - half, centre + half + 1):
            outside = max(-frame, frame - last, 0)
            if not outside:
                inside = frame
            elif padding == "replicate":
                inside = 0 if frame < 0 else last
            elif padding == "reflection":
                inside = outside if frame < 0 else last - outside
            elif padding == "reflection_circle":
                inside = centre + half + outside if frame < 0 else centre - half - outside
            else:
                inside = frame + window if frame < 0 else frame - window
            indices.append(inside)
        windows.append(indices)
    return windows


def _cut(clip: Tensor | None, window: list[int]) -> Tensor | None:
    return None if clip is None else clip[:, window]


def _window_features(network: Any, clip: Tensor, window: list[int], known: dict[int, Features]) -> Features:
    """The features of a window's frames, each (b, t, c, h, w); those not `known` yet are extracted and added."""
    new = sorted(set(window) - known.keys())
    if new:
        extracted = network.extract(clip[:, new])
        known |= {frame: _each(lambda level, at=at: level[:, at], extracted) for at, frame in enumerate(new)}
    return _each(lambda *frames: torch.stack(frames, dim=1), *(known[frame] for frame in window))


def _each(function: Callable[..., Tensor], *features: Features) -> Features:
    """`function` of tensors, or level by level of pyramids of them."""
    if isinstance(features[0], Tensor):
        return function(*features)
    return Pyramid(*(function(*level) for level in zip(*features, strict=True)))
