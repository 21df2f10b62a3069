"""What one forward pass knows (`Context`): frames, masks, flows, a memo, auxiliary losses, and where plug-ins go."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vsrplug.plugin import Plugin

PaddingMode = Literal["replicate", "reflect"]
Routes = Mapping[str, Sequence[tuple[str, "Plugin"]]]  # site -> (attach name, plug-in), in the order they were attached


class Flows(NamedTuple):
    """Optical flow between consecutive frames, each (b, t-1, 2, h, w) in LR pixels, x then y.

    `backward[:, i]` lives on frame i and points into frame i + 1: it warps frame i + 1 onto frame i, as the backward
    branch of BasicVSR does. `forward[:, i]` lives on frame i + 1 and points into frame i.
    """

    backward: Tensor
    forward: Tensor


class Context:
    """One forward pass. Made for one call of a `PluggedModel` and used up by it; a second use is an error.

    Args:
        frames: (b, t, 3, h, w) in [0, 1], the low-resolution clip.
        masks: (b, t, m, h, w), 0 or 1: object masks of the frames, for plug-ins that read them.
        keys: (b, n, 3, h, w), external key frames, for latent attention.
        target: (b, t, 3, s h, s w), ground truth; the trainer sets it for plug-ins whose loss needs it.

    Attributes:
        flows: set by flow-based backbones, else None.
        window: frames of the backbone's window, of which it restores the centre; None for recurrent networks.
        memo: what a plug-in computes once a pass. Keys are the plug-in, or `(plugin, site, t)` inside `forward`.
    """

    def __init__(
        self, frames: Tensor, masks: Tensor | None = None, keys: Tensor | None = None, target: Tensor | None = None
    ) -> None:
        if frames.ndim != 5:
            raise ValueError(f"frames must be (b, t, 3, h, w), got shape {tuple(frames.shape)}")
        if masks is not None and (masks.ndim != 5 or _but_channels(masks) != _but_channels(frames)):
            raise ValueError(
                f"masks must be (b, t, m, h, w) like the frames {tuple(frames.shape)}, got {tuple(masks.shape)}"
            )
        if target is not None and not _enlarges(target, frames):
            raise ValueError(
                f"target must be (b, t, 3, s h, s w), s a whole number, of the frames {tuple(frames.shape)}, got "
                f"{tuple(target.shape)}"
            )
        self.frames = frames
        self.masks = masks
        self.keys = keys
        self.target = target
        self.flows: Flows | None = None
        self.window: int | None = None
        self.memo: dict[Hashable, Any] = {}
        self._losses: dict[tuple[str, str], dict[tuple[str, int | None], Tensor]] = {}
        self._routes: Routes = {}
        self._used = False
        self._learning = False

    @property
    def losses(self) -> dict[str, Tensor]:
        """`"<attach name>/<loss>"` -> scalar, the mean over the sites and steps that reported it.

        The backbone's own are `"backbone/<loss>"`.
        """
        return {
            f"{attached}/{loss}": sum(values.values()) / len(values)  # type: ignore[misc]
            for (attached, loss), values in self._losses.items()
        }

    def begin(self, routes: Routes, window: int | None = None) -> None:
        """Take the plug-ins of this pass. Called by `PluggedModel`; raises RuntimeError on a second pass."""
        if self._used:
            raise RuntimeError("this Context was used by an earlier pass; make a new one for every call of the model")
        self._used = True
        self.window = window
        self._routes = routes
        self._learning = torch.is_grad_enabled()

    def pad(self, multiple: int, mode: PaddingMode = "replicate") -> Tensor:
        """Frames (b, t, 3, h', w') with h' and w' multiples of `multiple`; masks and target are padded alike.

        The bottom and right get the last row and column again ("replicate") or the frame mirrored about them
        ("reflect", any size: where a side is too short it is mirrored again). Calling it again changes nothing, so a
        backbone calls it first thing, whether or not the model around it did already.
        """
        if self.target is not None:  # of the enlarged frames
            self.target = _pad(self.target, multiple, mode, self.target.shape[-1] // self.frames.shape[-1])
        self.frames = _pad(self.frames, multiple, mode)
        if self.masks is not None:
            self.masks = _pad(self.masks, multiple, mode)
        return self.frames

    def refine(self, site: str, feature: Tensor, t: int | None = None, **given: Any) -> Tensor:
        """The feature after every plug-in at `site`; the feature itself where nothing is attached.

        Args:
            site: the backbone's name for this place.
            feature: (b, c, h, w) at a frame site, (b, t, c, h, w) at a clip site.
            t: time step, at frame sites of recurrent networks.
            given: what the site offers besides: `source` and `flow`, or `neighbours`.

        Raises:
            TypeError: a plug-in changed the shape or the dtype.
        """
        for attached, plugin in self._routes.get(site, ()):
            refined = plugin(feature, self, site=site, t=t, **given)
            if refined.shape != feature.shape or refined.dtype != feature.dtype:
                raise TypeError(
                    f"plug-in {attached!r} at site {site!r} was given {tuple(feature.shape)} {feature.dtype} and "
                    f"returned {tuple(refined.shape)} {refined.dtype}; a plug-in keeps shape and dtype"
                )
            if refined.stride() != feature.stride():
                # Another memory layout would choose another convolution kernel downstream, which rounds otherwise: the
                # identity has to hold to the last bit.
                refined = torch.empty_like(feature).copy_(refined)
            feature = refined
        return feature

    def add_loss(self, plugin: Plugin | None, name: str, value: Tensor, *, site: str, t: int | None = None) -> None:
        """Report an auxiliary loss. The same (plug-in, name, site, t) again replaces the value, it never adds:
        gradient checkpointing runs a site twice.

        Args:
            plugin: whose loss it is; None for one of the backbone's own, which is then called `"backbone/<name>"`.
            name: of the loss.
            value: a scalar.
            site: where it was computed.
            t: time step, at frame sites.

        Raises:
            RuntimeError: the plug-in is not on the model of this pass.
        """
        attached: str | None = "backbone"
        if plugin is not None:
            attached = next((known for routes in self._routes.values() for known, p in routes if p is plugin), None)
        if attached is None:
            raise RuntimeError(
                f"this {type(plugin).__name__} reports the loss {name!r} to a pass it is not attached to; call the "
                "model that attach made, or use the plain module"
            )
        if self._learning and not torch.is_grad_enabled():
            warnings.warn(
                f"the loss {attached}/{name} was computed without gradient and will train nothing: reentrant gradient "
                "checkpointing runs its first pass so. Use checkpoint(..., use_reentrant=False).",
                stacklevel=2,
            )
        self._losses.setdefault((attached, name), {})[site, t] = value


def _enlarges(target: Tensor, frames: Tensor) -> bool:
    """Whether the sizes of `target` are those of `frames` times one whole number."""
    if target.ndim != 5:
        return False
    h, w = frames.shape[-2:]
    scale = target.shape[-1] // w
    return scale > 0 and target.shape[-2:] == (scale * h, scale * w)


def _but_channels(clip: Tensor) -> tuple[int, ...]:
    return tuple(clip.shape[:2] + clip.shape[3:])


def _pad(clip: Tensor, multiple: int, mode: PaddingMode, scale: int = 1) -> Tensor:
    """`clip`, `scale` times as large as what is padded to `multiple`, with rows and columns that are there already."""
    bottom, right = (-side % (scale * multiple) for side in clip.shape[-2:])
    if not (bottom or right):
        return clip
    if mode == "reflect":
        for dim, more in ((-2, bottom), (-1, right)):
            clip = clip.index_select(dim, _mirrored(clip.shape[dim], more, scale, clip.device))
        return clip
    frames = clip.flatten(0, 1)
    values = frames if frames.is_floating_point() else frames.float()  # masks may be bool, which torch does not pad
    padded = F.pad(values, (0, right, 0, bottom), mode="replicate")
    return padded.to(clip.dtype).unflatten(0, clip.shape[:2])


def _mirrored(side: int, more: int, scale: int, device: torch.device) -> Tensor:
    """Indices that lengthen a side by `more`, mirrored about its last low-resolution pixel, of `scale` pixels here."""
    last = side // scale - 1
    period = max(2 * last, 1)
    position = torch.arange(last + 1 + more // scale, device=device) % period
    away = (position > last)[:, None]  # on the way back, where the pixels within a low-resolution one turn round too
    within = torch.arange(scale, device=device)
    pixel = torch.where(away, period - position[:, None], position[:, None])
    return (scale * pixel + torch.where(away, within.flip(0), within)).flatten()
