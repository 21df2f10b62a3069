"""Cross-frame non-local attention: a frame asks its neighbours' pixels, near ones first, without alignment.

Paper: Yu, Liu, Bo, Mei, "Memory-Augmented Non-Local Attention for Video Super-Resolution", 2021, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.maps import Maps, at_site, over_time
from vsrplug.plugin import Plugin
from vsrplug.site import SiteSpec

from ._gaussian_attention import Weighting, gaussian_attention


class GaussianCrossFrameAttention(nn.Module):
    """Refine one frame's feature with those of T frames (MANA eq. 1).

    With Q = query(F), K = key(F') and V = value(F') of group-normalised features, G = exp(-d^2 / 2 sigma^2) of the
    distance d in pixels, and for each of the T frames F' by itself,

        X = (G softmax(Q K)) V,   F + W [X_1, ..., X_T]

    The scores are not divided by sqrt(C'), and what the Gaussian takes from the softmax's sum is not made up for. The
    softmax is the official code's: eq. 1 has none. W starts at zero, so that the module is the identity until trained.
    No matrix of all pairs of pixels is made, forward or backward.

    Args:
        channels: width c of the features.
        frames: T, frames of the clip; 7 in the paper.
        embedding: C', width of query, key and value; half of `channels` unless given.
        groups: groups of the normalisation; the official code's 32 where `channels` can be split so.
        sigma: width of the Gaussian in pixels to start with; it is learned.
        weighting: `"gaussian_of_softmax"`, the official code's; `"product"`, eq. 1 to the letter, G (Q K) V; or
            `"softmax_of_gaussian"`, softmax(Q K + log G) V, whose weights sum to one and which is local, and so fast.
        eps: pixels where G is below it are skipped, 0 skips none. By default 2**-24, the rounding of float32, and 1e-4
            for `"softmax_of_gaussian"`, which makes most of its speed.
        zero_init: start as the identity; False to train a network from scratch.

    Shape:
        query: (b, c, h, w), clip: (b, T, c, h, w) -> (b, c, h, w); any h and w.

    Raises:
        ValueError: channels that the groups do not divide, an unknown weighting, a sigma or eps out of range.
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^phi\.", "query."),
        (r"^theta\.", "key."),
        (r"^g\.", "value."),
        (r"^W_z\.", "output."),
        (r"^std$", "sigma"),
    )
    # The table of distances, which is for one size, and the memory's own.
    official_ignored: ClassVar[tuple[str, ...]] = ("D", "mb", r"W_z1\.(weight|bias)")

    def __init__(
        self,
        channels: int,
        frames: int = 7,
        embedding: int | None = None,
        groups: int = 32,
        sigma: float = 4.0,
        weighting: Weighting = "gaussian_of_softmax",
        eps: float | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"channels={channels} cannot be normalised in groups={groups}; give groups that divide it")
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting is {weighting!r}; expected one of {', '.join(map(repr, get_args(Weighting)))}")
        if frames < 1 or sigma <= 0:
            raise ValueError(f"frames is one at least and sigma above zero, got frames={frames}, sigma={sigma}")
        if eps is None:
            eps = 1e-4 if weighting == "softmax_of_gaussian" else 2.0**-24
        if not 0 <= eps < 1:
            raise ValueError(f"eps is the least Gaussian weight that counts, from 0 (all do) to below 1, got {eps}")
        embedding = embedding or channels // 2
        self.frames = frames
        self.weighting: Weighting = weighting
        self.eps = eps
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # the official code's; torch's is 1e-5
        self.query = nn.Conv2d(channels, embedding, 1)
        self.key = nn.Conv2d(channels, embedding, 1)
        self.value = nn.Conv2d(channels, embedding, 1)
        self.sigma = nn.Parameter(torch.full((1,), float(sigma)))
        self.output = nn.Conv2d(frames * embedding, channels, 1)
        if zero_init:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, query: Tensor, clip: Tensor) -> Tensor:
        """The refined feature of one frame, (b, c, h, w).

        Args:
            query: (b, c, h, w), that frame's feature.
            clip: (b, T, c, h, w), its own among them or not.

        Raises:
            ValueError: shapes that do not go together, or another number of frames than the module was made for.
        """
        if clip.ndim != 5 or query.shape != clip[:, 0].shape or clip.shape[1] != self.frames:
            raise ValueError(
                f"expected a query (b, c, h, w) and a clip (b, {self.frames}, c, h, w) of the same b, c, h and w, got "
                f"{tuple(query.shape)} and {tuple(clip.shape)}; the number of frames is the constructor's `frames`"
            )
        return self._refine(query, self.norm(query), *self._embed(self._normalise(clip)), range(self.frames))

    def refine_clip(self, clip: Tensor, centres: Sequence[int]) -> Tensor:
        """The clip with some frames refined, each by the T around it; keys and values are computed once for all.

        Beyond the ends of the clip the first and the last frame stand in, so any length will do.

        Args:
            clip: (b, t, c, h, w).
            centres: the frames to refine, from 0 to t - 1.

        Returns:
            (b, t, c, h, w)

        Raises:
            ValueError: the module was made for an even number of frames, which has no centre.
        """
        check_centre(self.frames)
        normalised = self._normalise(clip)
        keys, values = self._embed(normalised)
        refined = list(clip.unbind(1))
        for centre in centres:
            window = self.around(centre, clip.shape[1])
            refined[centre] = self._refine(clip[:, centre], normalised[:, centre], keys, values, window)
        return torch.stack(refined, 1)

    def around(self, centre: int, count: int) -> list[int]:
        """The frames around one of a clip of `count`, the first and the last standing in beyond its ends."""
        first = centre - self.frames // 2
        return [min(max(frame, 0), count - 1) for frame in range(first, first + self.frames)]

    def maps(self, query: Tensor, clip: Tensor, *, at: tuple[int, int, int]) -> Maps:
        """The weights that one pixel of the query gives to the pixels of every frame, for pictures.

        Args:
            query, clip: as in `forward`; the first of a batch is shown.
            at: a frame, which does not matter here, and row and column of the pixel in the query.

        Returns:
            `"attention"`: for each of the T frames (h, w). Their sum is 1 for every frame, but for what the Gaussian
            takes away; of `"product"` they have no sum, and may be negative.
        """
        _, row, column = at
        asking = self.query(self.norm(query[:1]))[0, :, row, column]
        scores = torch.einsum("c,tchw->thw", asking, self.key(self.norm(clip[0])))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        y, x = (torch.arange(size, device=scores.device) for size in scores.shape[1:])
        squared = (y[:, None] - row).square() + (x - column).square()
        logarithm = -squared / (2 * self.sigma.to(scores.dtype).abs().clamp(min=1e-6).square())
        if self.weighting == "softmax_of_gaussian":
            weights = (scores + logarithm).flatten(1).softmax(1).view_as(scores)
        else:
            softmax = self.weighting == "gaussian_of_softmax"
            weights = (scores.flatten(1).softmax(1).view_as(scores) if softmax else scores) * logarithm.exp()
        return {"attention": over_time(weights, self.frames // 2)}

    def _normalise(self, clip: Tensor) -> Tensor:
        return self.norm(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])

    def _embed(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all frames, each (b, t, c', h, w)."""
        frames = normalised.flatten(0, 1)
        shape = normalised.shape[:2]
        return self.key(frames).unflatten(0, shape), self.value(frames).unflatten(0, shape)

    def _refine(
        self, feature: Tensor, normalised: Tensor, keys: Tensor, values: Tensor, window: Sequence[int]
    ) -> Tensor:
        """The feature refined by the frames `window` of keys and values, in that order; some may come twice."""
        reach = slice(min(window), max(window) + 1)
        query = self.query(normalised)
        attended = gaussian_attention(query, keys[:, reach], values[:, reach], self.sigma, self.weighting, self.eps)
        attended = torch.cat([attended[:, frame - reach.start] for frame in window], 1)
        return feature + self.output(attended).to(feature.dtype)


class GaussianCrossFrameAttentionPlugin(Plugin):
    """A `GaussianCrossFrameAttention` at each site, which are clips.

    In a window network, which restores the centre frame, that frame alone is refined; in a recurrent network every
    frame is, by itself and (frames - 1) / 2 on either side. Beyond the ends of a clip its first and last frame stand
    in, so one longer than the clip works, but has weights for nothing.

    Args:
        channels: width of the sites.
        sites: where it goes; by default `features`, before any alignment, as in MANA, or else the `fused` clip of
            recurrent networks.
        frames: T, odd.
        embedding, groups, sigma, weighting, eps, zero_init: as in `GaussianCrossFrameAttention`.

    Raises:
        ValueError: an even number of frames, or what `GaussianCrossFrameAttention` refuses.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("features", "fused")
    kinds = ("clip",)

    def __init__(
        self,
        channels: int,
        *,
        sites: Sequence[str] | None = None,
        frames: int = 7,
        embedding: int | None = None,
        groups: int = 32,
        sigma: float = 4.0,
        weighting: Weighting = "gaussian_of_softmax",
        eps: float | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, sites=sites)
        check_centre(frames)
        self.at = nn.ModuleDict(
            {
                site: GaussianCrossFrameAttention(channels, frames, embedding, groups, sigma, weighting, eps, zero_init)
                for site in self.sites
            }
        )

    def choose_sites(self, known: Mapping[str, SiteSpec]) -> tuple[str, ...]:
        """The first of the default sites that is a clip here."""
        return tuple(site for site in super().choose_sites(known) if known[site].kind == "clip")[:1]

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine a clip (b, t, c, h, w): its centre frame in a window network, else all its frames."""
        count = feature.shape[1]
        attention: GaussianCrossFrameAttention = self.at[site]  # type: ignore[assignment]
        return attention.refine_clip(feature, range(count) if context.window is None else [count // 2])

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
        """What a pixel of the frame attends to, see `GaussianCrossFrameAttention.maps`."""
        attention: GaussianCrossFrameAttention = self.at[site]  # type: ignore[assignment]
        window = feature[:1, attention.around(at[0], feature.shape[1])]
        return at_site(attention.maps(feature[:1, at[0]], window, at=at), site)


def check_centre(frames: int) -> None:
    """Raise ValueError for a number of frames that has no centre."""
    if frames % 2 == 0:
        raise ValueError(f"frames must be odd, a centre and as many on either side, got {frames}")
