"""Latent attention: what other places and frames of a clip have to say about a pixel, as a random variable.

Paper: Wang, Dong, Gong, Chen, "Efficient Video Super-Resolution with Latent Attention", Computer Science 50(11A), 2023,
sections 4 to 6. The authors released no code; docs/plugins/latent_attention.md says where the text is silent and what
is done here. Inside the blocks clips are b t h w c, as linear layers and attention take them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from vsrplug.context import Context
from vsrplug.maps import Maps, at_site, over_time
from vsrplug.plugin import Plugin
from vsrplug.site import Kind, SiteSpec

Range = Literal["long", "short"]


class LatentAttentionBlock(nn.Module, ABC):
    """What both kinds of block share: z = mu + eps sigma, added to the clip (section 4.3, fig. 5, eq. 17).

    Mean and variance are two parallel linear layers at the end of a block. While training, z is sampled with noise of
    torch's generator; at test, and while the variance is frozen (closed, in algorithm 1), it is the mean. A linear
    layer that starts at zero brings z into the clip: the module is the identity until trained, whatever the noise. The
    variance starts near e^-6, next to none, as stage one of algorithm 1 has it.

    Args:
        channels: width c of the clips.
        embedding: width c' of z and of everything inside; half of `channels` unless given.
        variational: False leaves the variance out: the deterministic attention of the paper's tables 1 and 2.
        zero_init: start as the identity; False to train a network from scratch.

    Shape:
        query: (b, t, c, h, w), keys: see the kinds of block -> (b, t, c, h, w)
    """

    def __init__(
        self, channels: int, embedding: int | None = None, variational: bool = True, zero_init: bool = True
    ) -> None:
        super().__init__()
        self.channels = channels
        self.embedding = embedding or max(channels // 2, 1)
        self.mean = nn.Linear(self.embedding, self.embedding)
        self.log_variance = nn.Linear(self.embedding, self.embedding) if variational else None
        self.output = nn.Linear(self.embedding, channels)
        if self.log_variance is not None:
            nn.init.constant_(self.log_variance.bias, -6.0)
        if zero_init:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, query: Tensor, *keys: Tensor) -> Tensor:
        """The refined clip, of the query's shape and dtype.

        Args:
            query: (b, t, c, h, w), the clip to refine.
            keys: the clips to attend to; none stands for the query itself.

        Raises:
            ValueError: not clips of this width, or clips that do not fit together.
        """
        return self.refine(query, *keys)[0]

    def refine(self, query: Tensor, *keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """The refined clip, and the mean over z of its divergence from a standard normal; None without a variance."""
        mean, log_variance = self._heads(query, keys)
        z, divergence = mean, None
        if log_variance is not None:
            divergence = (mean.to(log_variance).square() + log_variance.exp() - 1 - log_variance).mean() / 2
            if self.training and self.log_variance.weight.requires_grad:  # type: ignore[union-attr]
                z = (mean + torch.randn_like(log_variance) * (log_variance / 2).exp()).to(mean.dtype)
        return query + _channels_third(self.output(z)).to(query.dtype), divergence

    def distribution(self, query: Tensor, *keys: Tensor) -> Normal:
        """The posterior of z, (b, t, c', h, w), for pictures: its mean, its deviation, or samples (fig. 8).

        Raises:
            ValueError: the block was made without a variance.
        """
        mean, log_variance = self._heads(query, keys)
        if log_variance is None:
            raise ValueError("a block made with variational=False has no distribution; its attention is one value")
        return Normal(_channels_third(mean).to(log_variance), _channels_third((log_variance / 2).exp()))

    @abstractmethod
    def _attended(self, query: Tensor, keys: Sequence[Tensor]) -> Tensor:
        """The block up to its heads: (b, t, c, h, w) -> (b, t, h, w, c')."""

    def _heads(self, query: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Mean and, at least in float32, logarithm of the variance, both (b, t, h, w, c')."""
        attended = self._attended(query, keys)
        mean = self.mean(attended)
        if self.log_variance is None:
            return mean, None
        return mean, self.log_variance(attended).to(torch.promote_types(mean.dtype, torch.float32))

    def _check(self, query: Tensor, keys: Sequence[Tensor]) -> None:
        c = self.channels
        if query.ndim != 5 or query.shape[2] != c:
            raise ValueError(f"the query must be a clip (b, t, {c}, h, w), got {tuple(query.shape)}")
        for key in keys:
            if key.ndim != 5 or key.shape[0] != query.shape[0] or key.shape[2] != c:
                raise ValueError(
                    f"a key clip must have batch and channels of the query, ({query.shape[0]}, n, {c}, h, w), got "
                    f"{tuple(key.shape)}; key frames have to be embedded first"
                )


class LongRangeAttention(LatentAttentionBlock):
    """Attention of every position over all positions of the key clips (eq. 9 to 11).

    A convolution and a pooling halve the frames, keys and values are pooled once more:
    softmax(phi(x')^T theta(x)) g(x') with linear phi, theta and g, without 1/sqrt(c'). A transposed convolution
    restores the size. No scores are stored: memory is linear in t h w and in the size of the keys, also of the backward
    pass. Time grows with the product of the two.

    The key clips may have any number of frames and any size; one softmax goes over all of them. Arguments as in
    `LatentAttentionBlock`.
    """

    def __init__(
        self, channels: int, embedding: int | None = None, variational: bool = True, zero_init: bool = True
    ) -> None:
        super().__init__(channels, embedding, variational, zero_init)
        width = self.embedding
        self.reduce = nn.Conv3d(channels, width, 3, padding=1)
        self.theta = nn.Linear(width, width, bias=False)
        self.phi = nn.Linear(width, width, bias=False)
        self.g = nn.Linear(width, width, bias=False)
        self.enlarge = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)

    def attend(self, query: Tensor, *keys: Tensor, at: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """The weights that chosen positions give to the keys, for pictures (fig. 7).

        Args:
            query, keys: as in `forward`.
            at: frame, row and column of each position, in pixels of the query.

        Returns:
            For each key clip (b, len(at), n, h', w'), where h' and w' are its h and w halved twice, rounded up. The
            weights of one position over all key clips sum to 1.

        Raises:
            IndexError: a position outside the query.
        """
        reduced, others = self._reduced(query, keys)
        t, h, w = query.shape[1], *query.shape[3:]
        for position in at:
            if any(not 0 <= i < size for i, size in zip(position, (t, h, w), strict=True)):
                raise IndexError(f"there is no frame, row, column {tuple(position)} in a clip of {t} x {h} x {w}")
        frames, rows, columns = ([position[axis] // (2 if axis else 1) for position in at] for axis in range(3))
        phi = [_halved(self.phi(other)) for other in others]
        scores = self.theta(reduced)[:, frames, rows, columns] @ _positions(phi).mT
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        sizes = [found.shape[1:4] for found in phi]
        parts = weights.split([math.prod(size) for size in sizes], -1)
        return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]

    def _attended(self, query: Tensor, keys: Sequence[Tensor]) -> Tensor:
        reduced, others = self._reduced(query, keys)
        theta = self.theta(reduced).flatten(1, 3)
        phi, g = (_positions([_halved(linear(other)) for other in others]) for linear in (self.phi, self.g))
        # Zeros fill c' up to a multiple of 8 and change no score: torch's kernels for other widths store all scores.
        theta, phi, g = (F.pad(x, (0, -self.embedding % 8)).unsqueeze(1) for x in (theta, phi, g))
        gathered = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)[:, 0, :, : self.embedding]
        return _leaky(_doubled(self.enlarge, gathered.unflatten(1, reduced.shape[1:4]), query.shape[3:]))

    def _reduced(self, query: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Query and keys at half the size, (b, t, h/2, w/2, c'); the query among the keys is computed once."""
        self._check(query, keys)
        reduced = self._reduce(query)
        return reduced, [reduced if key is query else self._reduce(key) for key in keys or (query,)]

    def _reduce(self, clip: Tensor) -> Tensor:
        return _halved(_leaky(_over_clips(self.reduce, _channels_last(clip))))


class ShortRangeAttention(LatentAttentionBlock):
    """A mask of what is near in space and time, multiplied into the key clip (eq. 12 to 14).

    M([w_x x', w_y x]) * w_x x', where M goes bottom-up through `stacks` convolutions with a pooling each, and top-down
    through as many transposed convolutions. The one key clip has the query's shape. Other arguments as in
    `LatentAttentionBlock`.

    Args:
        stacks: l of fig. 3; with the paper's 2 a position sees 5 frames.
    """

    def __init__(
        self,
        channels: int,
        embedding: int | None = None,
        variational: bool = True,
        zero_init: bool = True,
        stacks: int = 2,
    ) -> None:
        super().__init__(channels, embedding, variational, zero_init)
        width = self.embedding
        self.key = nn.Linear(channels, width, bias=False)
        self.query = nn.Linear(channels, width, bias=False)
        self.reduce = nn.ModuleList(nn.Conv3d(width if i else 2 * width, width, 3, padding=1) for i in range(stacks))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1) for _ in range(stacks))

    def attend(self, query: Tensor, *keys: Tensor) -> Tensor:
        """The mask, for pictures: (b, t, c', h, w) in [0, 1]; arguments as in `forward`."""
        return _channels_third(self._masked(query, keys)[1])

    def _attended(self, query: Tensor, keys: Sequence[Tensor]) -> Tensor:
        key, mask = self._masked(query, keys)
        return key * mask

    def _masked(self, query: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The embedded key and its mask, both (b, t, h, w, c')."""
        self._check(query, keys)
        if len(keys) > 1 or any(key.shape != query.shape for key in keys):
            raise ValueError(
                f"short-range attention takes one key clip of the query's shape {tuple(query.shape)}, got "
                f"{' and '.join(str(tuple(key.shape)) for key in keys)}; long-range attention takes others"
            )
        own = _channels_last(query)
        key = self.key(_channels_last(keys[0]) if keys else own)
        mask = torch.cat([key, self.query(own)], -1)
        sizes = []
        for reduce in self.reduce:
            sizes.append(mask.shape[2:4])
            mask = _halved(_leaky(_over_clips(reduce, mask)))
        for enlarge in self.enlarge:
            mask = _doubled(enlarge, mask, sizes.pop())
            mask = _leaky(mask) if sizes else mask.sigmoid()
        return key, mask


class LatentAttention(nn.Module):
    """Blocks of long-range and short-range attention, one after another (section 6.3).

    External clips, such as features of key frames from elsewhere in the video, are what the long-range blocks attend to
    besides the clip itself (sections 4.3, 6.2).

    Args:
        channels: width c of the clips.
        order: a `"long"` or a `"short"` for each block; the default is the best of table 2.
        embedding, variational, zero_init: as in `LatentAttentionBlock`.

    Shape:
        clip: (b, t, c, h, w), external: each (b, n, c, h', w') -> (b, t, c, h, w)
    """

    def __init__(
        self,
        channels: int,
        order: Sequence[Range] = ("short", "long", "long", "short"),
        embedding: int | None = None,
        variational: bool = True,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(order, str) or not order or set(order) - set(get_args(Range)):
            raise ValueError(f"order is a sequence of 'long' and 'short', one for each block, got {order!r}")
        kinds = {"long": LongRangeAttention, "short": ShortRangeAttention}
        self.blocks = nn.ModuleList(kinds[kind](channels, embedding, variational, zero_init) for kind in order)

    def forward(self, clip: Tensor, *external: Tensor) -> Tensor:
        """The refined clip, (b, t, c, h, w)."""
        return self.refine(clip, *external)[0]

    def refine(self, clip: Tensor, *external: Tensor) -> tuple[Tensor, Tensor | None]:
        """The refined clip, and the mean of the blocks' divergences, a scalar; None without a variance."""
        divergences = []
        for block in self.blocks:
            keys = self._keys(block, clip, external)
            clip, divergence = block.refine(clip, *keys)  # type: ignore[operator]
            divergences.append(divergence)
        return clip, None if divergences[0] is None else torch.stack(divergences).mean()

    def maps(self, clip: Tensor, *external: Tensor, at: tuple[int, int, int]) -> Maps:
        """What the first block of each kind attends to, in the first clip of a batch, for pictures (fig. 7, 8).

        Args:
            clip, external: as in `forward`.
            at: frame, row and column.

        Returns:
            `"long-range attention"`: the weights that the position `at` gives to every frame at a quarter of the size,
            and to every external key; together they are 1. `"short-range mask"`: of every frame, (h, w), the mean of
            the mask over its channels, in [0, 1].
        """
        found: Maps = {}
        kinds = {type(block) for block in self.blocks}
        for block in self.blocks:
            keys = self._keys(block, clip, external)
            if isinstance(block, LongRangeAttention) and "long-range attention" not in found:
                own, *others = (weights[0, 0] for weights in block.attend(clip, *keys, at=[at]))
                titled = {f"key {i}": plane for i, plane in enumerate(plane for other in others for plane in other)}
                found["long-range attention"] = over_time(own, at[0]) | titled
            elif isinstance(block, ShortRangeAttention) and "short-range mask" not in found:
                found["short-range mask"] = over_time(block.attend(clip)[0].mean(1), at[0])
            if len(found) == len(kinds):
                break
            clip = block(clip, *keys)
        return found

    def _keys(self, block: nn.Module, clip: Tensor, external: Sequence[Tensor]) -> Sequence[Tensor]:
        return (clip, *external) if external and isinstance(block, LongRangeAttention) else ()


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)  # the paper names no slope; this is the default of the framework it used


def _channels_last(clip: Tensor) -> Tensor:
    """(b, t, c, h, w) -> (b, t, h, w, c)."""
    return clip.permute(0, 1, 3, 4, 2).contiguous()


def _channels_third(x: Tensor) -> Tensor:
    """(b, t, h, w, c) -> (b, t, c, h, w)."""
    return x.permute(0, 1, 4, 2, 3)


def _over_clips(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(b, t, h, w, c) through what takes (b, c, t, h, w)."""
    return function(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def _over_frames(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(b, t, h, w, c) through what takes (b t, c, h, w)."""
    return function(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _halved(x: Tensor) -> Tensor:
    """The maximum of 2x2 pixels, (b, t, h, w, c) -> (b, t, h/2, w/2, c), rounded up: windows may stand out."""
    return _over_frames(lambda frames: F.max_pool2d(frames, 2, ceil_mode=True), x)


def _doubled(enlarge: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """What `enlarge` makes of (b, t, h, w, c), cropped to `size`, the h and w from before the halving."""
    return _over_frames(enlarge, x)[:, :, : size[0], : size[1]]


def _positions(clips: Sequence[Tensor]) -> Tensor:
    """Clips (b, n, h, w, c') as one row of positions, (b, n h w + ..., c')."""
    return torch.cat([clip.flatten(1, 3) for clip in clips], 1)


class LatentAttentionPlugin(Plugin):
    """A `LatentAttention` at each site. Reports the loss `<name>/kl` unless `variational` is False.

    By default at what enters the fusion or leaves it: `aligned` of EDVR, `fused` of recurrent networks.

    Args:
        channels: width of the sites.
        sites: where it goes.
        order, embedding, variational, zero_init: as in `LatentAttention`.
        length: a longer clip is refined in sequences of so many frames (section 6.2), so that time is linear in t.
        external_keys: attend to the key frames of `Context(frames, keys=...)` as well, (b, n, 3, h, w) of any size,
            embedded by a convolution of the plug-in's own.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("aligned", "fused")
    kinds: ClassVar[tuple[Kind, ...]] = ("clip",)

    def __init__(
        self,
        channels: int,
        *,
        sites: Sequence[str] | None = None,
        order: Sequence[Range] = ("short", "long", "long", "short"),
        embedding: int | None = None,
        length: int = 7,
        external_keys: bool = False,
        variational: bool = True,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, sites=sites)
        if length < 1:
            raise ValueError(f"length is the number of frames refined together, 1 or more, got {length}")
        if external_keys and "long" not in order:
            raise ValueError(f"external_keys=True needs a long-range block to attend to them, got order={order!r}")
        self.length = length
        self.keys = nn.Conv3d(3, channels, 3, padding=1) if external_keys else None
        self.at = nn.ModuleDict(
            {site: LatentAttention(channels, order, embedding, variational, zero_init) for site in self.sites}
        )

    def choose_sites(self, known: Mapping[str, SiteSpec]) -> tuple[str, ...]:
        """The default sites among `known` that hold a clip: `fused` of a window network is one frame."""
        return tuple(site for site in super().choose_sites(known) if known[site].kind == "clip")

    def prepare(self, context: Context) -> None:
        """Embed the key frames once for all sites.

        Raises:
            ValueError: key frames are missing, are not (b, n, 3, h, w), or are given to a plug-in made without them.
        """
        frames, keys = context.frames, context.keys
        if (keys is None) != (self.keys is None):
            raise ValueError(
                "latent attention with external_keys=True needs key frames: Context(frames, keys=...), (b, n, 3, h, w)"
                if keys is None
                else "the pass has key frames, but this latent attention was made without external_keys=True"
            )
        if keys is None or self.keys is None:
            return
        if keys.ndim != 5 or keys.shape[0] != len(frames) or keys.shape[2] != 3:
            raise ValueError(f"key frames must be ({len(frames)}, n, 3, h, w), got {tuple(keys.shape)}")
        context.memo[self] = _leaky(self.keys(keys.transpose(1, 2))).transpose(1, 2)

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine the feature of a clip, (b, t, c, h, w)."""
        attention: LatentAttention = self.at[site]  # type: ignore[assignment]
        external = self._external(feature, context)
        pieces = feature.split(self.length, 1) if feature.shape[1] > self.length else (feature,)
        refined, divergences = zip(*(attention.refine(piece, *external) for piece in pieces), strict=True)
        if divergences[0] is not None:
            shares = (value * piece.shape[1] for value, piece in zip(divergences, pieces, strict=True))
            context.add_loss(self, "kl", sum(shares) / feature.shape[1], site=site, t=t)
        return torch.cat(refined, 1) if len(refined) > 1 else refined[0]

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
        """What a pixel attends to within the frame's sequence, see `LatentAttention.maps`."""
        attention: LatentAttention = self.at[site]  # type: ignore[assignment]
        frame, row, column = at
        start = frame - frame % self.length
        external = (keys[:1] for keys in self._external(feature, context))
        sequence = feature[:1, start : start + self.length]
        return at_site(attention.maps(sequence, *external, at=(frame - start, row, column)), site)

    def _external(self, feature: Tensor, context: Context) -> list[Tensor]:
        """The embedded key frames, as coarse as the features of the site."""
        if self.keys is None:
            return []
        stride = context.frames.shape[-1] // feature.shape[-1]
        return [F.avg_pool3d(context.memo[self], (1, stride, stride), ceil_mode=True)]
