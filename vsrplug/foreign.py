"""Sites in networks that are not ours: the output of any named submodule, refined by a hook that lives for one pass."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.site import Kind, SiteSpec, unknown_name

Order = Literal["forward", "backward", "centre"]
_REGISTERING = threading.Lock()  # torch numbers its hooks without one: two threads could be given the same number


@dataclass(frozen=True)
class ForeignSite:
    """The output of the submodule `path` of any network, as a site.

    Args:
        path: dotted name as in `network.named_modules()`.
        channels: width of the submodule's output.
        kind: `"frame"`: it is called with one time step, (b, c, h, w); `"clip"`: it is called once with all frames
            folded into the batch, (b*t, c, h, w), and the plug-in sees (b, t, c, h, w).
        order: which frame a call belongs to, for `"frame"`: `"forward"` (first call is frame 0), `"backward"` (first
            call is the last frame) or `"centre"` (a window network: one call, for the middle frame).
        stride: LR pixels per feature pixel.
    """

    path: str
    channels: int
    kind: Kind
    order: Order | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        SiteSpec(self.channels, self.kind, self.stride)  # its checks
        if self.kind == "frame" and self.order not in get_args(Order):
            raise ValueError(
                f"a frame site needs order, one of {', '.join(map(repr, get_args(Order)))}, to know which frame a call "
                f"of {self.path!r} belongs to; got {self.order!r}"
            )

    @property
    def spec(self) -> SiteSpec:
        """The site as a backbone of ours would declare it."""
        return SiteSpec(self.channels, self.kind, self.stride)


def check_paths(network: nn.Module, sites: Mapping[str, ForeignSite]) -> None:
    """Raise ValueError unless every site names a submodule of `network`."""
    paths = [path for path, _ in network.named_modules() if path]
    for name, site in sites.items():
        if site.path not in paths:
            raise ValueError(f"foreign site {name!r}: " + unknown_name("submodule", site.path, paths))


@contextmanager
def hooked(network: nn.Module, sites: Mapping[str, ForeignSite], context: Context) -> Iterator[None]:
    """While the block runs, and in this thread only, outputs of the sites' submodules go through `context.refine`.

    Raises:
        RuntimeError: at the end, where a submodule was not called as its site says.
    """
    hooks = [_Hook(name, site, context) for name, site in sites.items()]
    with ExitStack() as stack:
        for hook in hooks:
            with _REGISTERING:
                handle = network.get_submodule(hook.site.path).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield
    for hook in hooks:
        hook.check_calls()


class _Hook:
    """Refines what one submodule returns during one pass, and counts its calls to know the frame."""

    def __init__(self, name: str, site: ForeignSite, context: Context) -> None:
        self.name, self.site, self.context = name, site, context
        self.thread = threading.get_ident()
        self.where = f"foreign site {name!r} (submodule {site.path!r})"
        self.calls = 0
        # A clip site may be called again: which frames it holds is never in doubt.
        each_frame, frames = site.kind == "frame" and site.order != "centre", context.frames.shape[1]
        self.expected = frames if each_frame else 1
        declared = f"order={site.order!r}" if site.kind == "frame" else "kind='clip'"
        self.rule = (
            f"{_times(self.expected)} for {frames} frames; {declared} expects one call a "
            f"{'frame' if each_frame else 'pass'}"
        )

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if threading.get_ident() != self.thread:
            return None
        where = self.where
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"{where}: the submodule must return one 4-D tensor (b, c, h, w), it returned {shape}")
        if output.shape[1] != self.site.channels:
            raise ValueError(
                f"{where}: declared with channels={self.site.channels}, but the submodule returned {output.shape[1]}"
            )
        if _inside_checkpoint():
            raise RuntimeError(
                f"{where}: the submodule runs under gradient checkpointing, which would repeat it in the backward "
                "pass without its plug-ins. Switch checkpointing off in this network, or use a native backbone."
            )
        batch, frames = self.context.frames.shape[:2]
        if self.site.kind == "clip":
            if len(output) != batch * frames:
                raise ValueError(
                    f"{where}: a clip site folds b*t = {batch}*{frames} frames into the batch, it got {len(output)}; "
                    'a submodule that is called once a frame is a site of kind="frame"'
                )
            self.calls += 1
            clip = output.unflatten(0, (batch, frames))
            return self.context.refine(self.name, clip).flatten(0, 1)
        if len(output) != batch:
            raise ValueError(
                f"{where}: a frame site is called with one time step, a batch of {batch}, it got {len(output)}; a "
                'submodule that is called once with all frames folded into the batch is a site of kind="clip"'
            )
        call, self.calls = self.calls, self.calls + 1
        if call >= self.expected:
            raise RuntimeError(f"{where}: called more than {self.rule}")
        t = {"forward": call, "backward": frames - 1 - call, "centre": frames // 2}[self.site.order or "centre"]
        return self.context.refine(self.name, output, t)

    def check_calls(self) -> None:
        """Too few calls would be a plug-in without effect, or with the masks of other frames, and nobody told."""
        if self.calls < self.expected:
            raise RuntimeError(
                f"{self.where}: called {_times(self.calls)}, not {self.rule}. A submodule whose weights are used "
                "without calling it, or that was compiled before, cannot be a site."
            )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _inside_checkpoint() -> bool:
    """Whether a caller up to the plugged model is torch's checkpoint, of either kind."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "vsrplug.plugged":
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
