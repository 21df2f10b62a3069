"""Latent attention: what other places and frames of a clip have to say about a pixel, as a random variable.

Paper: Wang, Dong, Gong, Chen, "Efficient Video Super-Resolution with Latent Attention", Computer Science 50(11A), 2023,
sections 4 to 6. The authors released no code; docs/plugins/latent_attention.md says where the text is silent and what
is done here. The two kinds of block are in long_range_attention.py and short_range_attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.maps import Maps, at_site, over_time
from vsrplug.plugin import Plugin
from vsrplug.site import Kind, SiteSpec

from ._latent_block import leaky
from .long_range_attention import LongRangeAttention
from .short_range_attention import ShortRangeAttention

Range = Literal["long", "short"]


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
        context.memo[self] = leaky(self.keys(keys.transpose(1, 2))).transpose(1, 2)

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
