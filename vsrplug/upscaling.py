"""`Upscaler`: super-resolve a clip of any length in bounded memory, in chunks that overlap and are blended."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.module import clip_network
from vsrplug.scene_cuts import CUT, numbered_scenes
from vsrplug.space_time import check_interpolates, interpolates, times_between

if TYPE_CHECKING:
    from vsrplug.data.clip import Clip

MaskSource = Callable[[Tensor], Tensor]  # lr (t, 3, h, w) -> (t, m, h, w)


class Upscaler:
    """Super-resolves clips in chunks: frames are read as they are needed and handed out as they are finished.

    The network sees `chunk` frames and `overlap` more on either side at a time. Around each border between chunks,
    `2 * overlap` frames are computed by both and blended linearly. Around a window network frames whose window was cut
    short are left out of that, so the result is the one of the whole clip. At a scene cut the network starts afresh.
    With `tile`, frames go through the network in squares; in the overlap of two, the outer quarters, which saw a border
    that is none, are dropped and the middle half is blended linearly.

    With `between`, `n = between + 1` restored frames come for each given one: itself, and those that divide the way to
    the next. After the last frame of a scene there is nothing to interpolate, so it is repeated and the clip lasts as
    long as before.

    At most `chunk + 2 * overlap` low-resolution frames and their restored ones are held at a time.

    Args:
        model: a network from clip to clip or a window network, with or without plug-ins; it is put into eval mode.
        chunk: frames that one pass adds.
        overlap: frames computed on either side of a chunk besides, fewer than `chunk`; at least half the window of a
            window network, and 1 with `between`.
        between: frames to make between each two, by a network that can (`STVUN`, `Bicubic`).
        tile: side in LR pixels of the squares the network sees at once, overlap included; None: whole frames.
        tile_overlap: LR pixels that neighbouring tiles share at least, fewer than `tile`.
        cut: distance of two frames above which a new scene begins (`vsrplug.scene_cuts`); None: never.
        masks: makes object masks of whole LR frames, for plug-ins that read them.
        device: where to run; the model is moved there. None: where its parameters are.

    Raises:
        ValueError: an argument out of range; while running, an output that is not finite, with its frame's number.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk: int = 24,
        overlap: int = 4,
        between: int = 0,
        tile: int | None = None,
        tile_overlap: int = 32,
        cut: float | None = CUT,
        masks: MaskSource | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        window = getattr(getattr(model, "backbone", model), "window", None) or 1
        _check_counts(
            chunk=chunk,
            overlap=overlap,
            between=between,
            tile_overlap=tile_overlap,
            **({} if tile is None else {"tile": tile}),
        )
        if between:
            check_interpolates(model, f"between={between}")
        if overlap >= chunk:
            raise ValueError(
                f"overlap={overlap} must be smaller than chunk={chunk}; try chunk={3 * max(overlap, 1)}, or a smaller "
                "overlap"
            )
        if overlap < window // 2:
            raise ValueError(
                f"overlap={overlap} is too small for a network with a window of {window} frames; it needs "
                f"overlap={window // 2} at least"
            )
        if between and not overlap:
            raise ValueError(
                f"overlap=0 leaves a chunk's last frame without a next one; between={between} needs overlap=1"
            )
        if tile is not None and tile_overlap >= tile:
            raise ValueError(
                f"tile_overlap={tile_overlap} must be smaller than tile={tile}, which counts the overlap; try "
                f"tile={4 * tile_overlap}"
            )
        if cut is not None and not 0 < cut < 1:
            raise ValueError(f"cut={cut} must lie between 0 and 1; try {CUT}, or null to ignore cuts")
        self.model = (model if device is None else model.to(device)).eval()
        self.chunk = chunk
        self.overlap = overlap
        self.tile = tile
        self.tile_overlap = tile_overlap
        self.cut = cut
        self.masks = masks
        self.rate = between + 1  # restored frames for each given one
        self.edge = max(window // 2, min(between, 1))  # frames that miss a neighbour at a chunk's end

    def frames(self, clip: Clip, missing: Callable[[int], bool] = lambda number: True) -> Iterator[tuple[int, Tensor]]:
        """(number, restored frame) in order, each (3, s h, s w) float32 in [0, 1] on the CPU.

        Numbers are those of restored frames: frame i of the clip has the number `(between + 1) * i`.

        Args:
            clip: what to restore.
            missing: whether the frame of a number is wanted. Chunks without any are read and passed over.
        """
        first = 0
        for _, scene in groupby(numbered_scenes(clip.frames(), self.cut), key=lambda numbered: numbered[0]):
            first = yield from self._scene((frame for _, frame in scene), first, missing)

    def _scene(
        self, frames: Iterator[Tensor], first: int, missing: Callable[[int], bool]
    ) -> Generator[tuple[int, Tensor], None, int]:
        """Restore one scene whose first frame has the number `first`; returns the number after its last."""
        low = start = first  # of the LR frames held, and of the chunk
        held: list[Tensor] = []
        restored: dict[int, Tensor] = {}  # by their own numbers, what the next chunk may still have a say in
        reached = first
        while True:
            wanted = start + self.chunk + self.overlap - low
            held.extend(islice(frames, wanted - len(held)))
            end = low + len(held)
            if end > reached and any(missing(number) for number in range(self.rate * low, self.rate * end)):
                self._restore_onto(restored, held, low, start)
            reached = end
            settled = end if len(held) < wanted else start + self.chunk - self.overlap
            last = self.rate * (end - 1)
            if len(held) < wanted and last in restored:
                restored |= {last + k: restored[last] for k in range(1, self.rate)}
            for number in sorted(number for number in restored if number < self.rate * settled):
                frame = restored.pop(number)
                if missing(number):
                    yield number, frame.clamp(0, 1)
            if len(held) < wanted:
                return end
            del held[: settled - low]
            low = settled
            start += self.chunk

    def _restore_onto(self, restored: dict[int, Tensor], held: list[Tensor], low: int, start: int) -> None:
        """Add the restored frames of a chunk that begins at `start`, blended with those of the chunk before."""
        width = max(2 * (self.overlap - self.edge), 1)
        for number, frame in enumerate(self._restore(torch.stack(held)), self.rate * low):
            if not frame.isfinite().all():
                raise ValueError(f"frame {number}: the model's output has values that are NaN or infinite")
            if number in restored:
                # The frames made of one window have one weight: where the next is cut short, none of them counts.
                # lerp is exact where both agree, and where the weight is 0 or 1
                weight = min(max(0.5 + (number // self.rate - start + 0.5) / width, 0.0), 1.0)
                frame = torch.lerp(restored[number], frame, weight)
            restored[number] = frame

    def _restore(self, lr: Tensor) -> Iterator[Tensor]:
        """The `rate` t restored frames (3, s h, s w) of lr (t, 3, h, w), not clamped, each with memory of its own."""
        masks = None if self.masks is None else self.masks(lr)
        rows = tile_starts(lr.shape[-2], self.tile, self.tile_overlap)
        columns = tile_starts(lr.shape[-1], self.tile, self.tile_overlap)
        tiles = []
        for y in rows:
            for x in columns:
                square = (..., slice(y, y + (self.tile or lr.shape[-2])), slice(x, x + (self.tile or lr.shape[-1])))
                tiles.append(self._run(lr[square], None if masks is None else masks[square]))
        scale = tiles[0].shape[-1] // min(self.tile or lr.shape[-1], lr.shape[-1])
        for t in range(self.rate * len(lr)):
            pieces = iter([tile[t] for tile in tiles])
            bands = [join([next(pieces) for _ in columns], [scale * x for x in columns], dim=-1) for _ in rows]
            yield join(bands, [scale * y for y in rows], dim=-2).clone()

    @torch.no_grad()
    def _run(self, lr: Tensor, masks: Tensor | None) -> Tensor:
        """lr (t, 3, h, w) -> (rate t, 3, s h, s w) on the CPU."""
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        network = clip_network(self.model)
        if len(lr) < 2 * self.edge + 1:
            network.padding = "replicate"  # type: ignore[assignment]  # the others need as many frames as the window has
        clip = lr[None].to(device)
        context = Context(clip, masks=None if masks is None else masks[None].to(device))
        keywords = {"times": times_between(self.rate - 1)} if interpolates(self.model) else {}
        try:
            return network(clip, context, **keywords)[0].float().cpu()
        except torch.OutOfMemoryError as error:
            smaller = max(64, min(lr.shape[-2:]) // 2)
            raise RuntimeError(
                f"out of memory with {len(lr)} frames of {lr.shape[-2]}x{lr.shape[-1]} at once; try a smaller chunk "
                f"(chunk={max(self.overlap + 1, self.chunk // 2)}) or tiles (tile={smaller})"
            ) from error


def tile_starts(size: int, tile: int | None, overlap: int) -> list[int]:
    """Where tiles begin along a side of `size` pixels: evenly spread, neighbours sharing `overlap` pixels at least."""
    if tile is None or tile >= size:
        return [0]
    gaps = math.ceil((size - tile) / (tile - overlap))
    return [round(gap * (size - tile) / gaps) for gap in range(gaps + 1)]


def join(pieces: list[Tensor], starts: list[int], dim: int) -> Tensor:
    """Put pieces together along a dimension (-1 or -2); where two overlap, the middle half blends linearly."""
    joined = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:], strict=True):
        shared = joined.shape[dim] - start
        centred = torch.arange(shared, dtype=piece.dtype) + 0.5 - shared / 2
        ramp = (0.5 + centred / max(shared / 2, 1)).clamp(0, 1)
        blended = torch.lerp(
            joined.narrow(dim, start, shared), piece.narrow(dim, 0, shared), ramp if dim == -1 else ramp[:, None]
        )
        rest = piece.narrow(dim, shared, piece.shape[dim] - shared)
        joined = torch.cat([joined.narrow(dim, 0, start), blended, rest], dim)
    return joined


def _check_counts(**counts: int) -> None:
    least = {"chunk": 1, "tile": 1}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least.get(name, 0):
            raise ValueError(f"{name}={count} must be a whole number, {least.get(name, 0)} or more")
