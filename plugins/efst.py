"""EFST: fuse features of several frames early, then make good what that lost with spatio-temporal weights.

Paper: Kang, Jo, Oh, Vajda, Kim, "Deep Space-Time Video Upsampling Networks", ECCV 2020, section 3.2, figures 4 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.maps import Maps, at_site, over_time
from vsrplug.plugin import Plugin
from vsrplug.site import SiteSpec

from ._blocks import lrelu, max_and_mean


class SpatioTemporalFusion(nn.Module):
    """Scale and shift a fused feature E by what a pyramid makes of the features e_t it was fused from (EFST eq. 1-3).

        s_t = sigmoid(theta(e_t) . delta(E)),   alpha, beta = pyramid(s_0 e_0, ..., s_n e_n),   alpha E + beta

    The confidence s_t is one map a frame. alpha is twice a sigmoid, and beta is made from alpha before that sigmoid, as
    in the official code; both last layers start at zero, so that alpha is 1 and beta 0 until trained.

    Args:
        channels: width c of the features.
        frames: number n of frames, 7 in the paper.
        zero_init: start as the identity; False to train a network from scratch.

    Raises:
        ValueError: in a call, neighbours that do not fit the fused feature or are not n frames.

    Shape:
        fused: (b, c, h, w), neighbours: (b, n, c, h, w), any h and w -> (b, c, h, w)
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^tAtt0\.", "theta."),
        (r"^tAtt1\.", "delta."),
        (r"^sAtt1\.0\.", "level1."),
        (r"^sAtt2\.0\.", "level2."),
        (r"^sAtt3\.0\.", "smooth2."),
        (r"^sAtt4\.0\.", "merge2."),
        (r"^sAtt5\.", "alpha."),
        (r"^sAttL1\.0\.", "embed2."),
        (r"^sAttL2\.0\.", "level3."),
        (r"^sAttL3\.0\.", "smooth3."),
        (r"^sAttA1\.0\.", "beta_hidden."),
        (r"^sAttA2\.", "beta."),
    )

    def __init__(self, channels: int, frames: int = 7, zero_init: bool = True) -> None:
        super().__init__()
        self.frames = frames
        self.theta = nn.Conv2d(channels, channels, 3, padding=1)
        self.delta = nn.Conv2d(channels, channels, 3, padding=1)
        self.level1 = nn.Conv2d(frames * channels, channels, 1)
        self.level2 = nn.Conv2d(2 * channels, channels, 1)
        self.embed2 = nn.Conv2d(channels, channels, 1)
        self.level3 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.smooth3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.smooth2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.merge2 = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Conv2d(channels, channels, 3, padding=1)
        self.beta_hidden = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Conv2d(channels, channels, 1)
        if zero_init:
            for head in (self.alpha, self.beta):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, fused: Tensor, neighbours: Tensor) -> Tensor:
        """The refined feature, (b, c, h, w)."""
        return self.refine(fused, neighbours)[0]

    def refine(self, fused: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """The refined feature (b, c, h, w), and the confidence maps s (b, n, h, w) in [0, 1], float32 or better."""
        self._check(fused, neighbours)
        confidence = self._confidence(fused, self._embed(neighbours))
        return self._weigh(fused, neighbours, confidence), confidence

    def refine_clip(self, clip: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """Refine every frame of a clip from the n frames around it; beyond the ends the first and last are repeated.

        The centre of n frames is number n // 2. Frames are embedded once for all the windows that hold them.

        Args:
            clip: (b, t, c, h, w), the fused features.
            neighbours: (b, t, c, h, w), what they were fused from; may be `clip` itself.

        Returns:
            The refined features (b, t, c, h, w), and their confidence maps (b, t, n, h, w) in [0, 1].
        """
        if neighbours.shape != clip.shape:
            raise ValueError(
                f"the neighbours of a clip are as many frames of the same size: expected {tuple(clip.shape)}, got "
                f"{tuple(neighbours.shape)}"
            )
        embedded = self._embed(neighbours)
        windows = [self._around(t, clip.shape[1]) for t in range(clip.shape[1])]
        confidence = [self._confidence(clip[:, t], embedded[:, w]) for t, w in enumerate(windows)]
        refined = [self._weigh(clip[:, t], neighbours[:, w], confidence[t]) for t, w in enumerate(windows)]
        return torch.stack(refined, 1), torch.stack(confidence, 1)

    def refine_frame(self, fused: Tensor, neighbours: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """As `refine`, of frame t of a clip, with the n of its `neighbours` (b, any, c, h, w) that are around t."""
        return self.refine(fused, neighbours[:, self._around(t, neighbours.shape[1])])

    def _around(self, t: int, count: int) -> list[int]:
        return [min(max(t - self.frames // 2 + i, 0), count - 1) for i in range(self.frames)]

    def _check(self, fused: Tensor, neighbours: Tensor) -> None:
        b, *rest = fused.shape
        if len(rest) != 3 or neighbours.shape != (b, self.frames, *rest):
            raise ValueError(
                f"EFST was made for frames={self.frames}: with a fused feature (b, c, h, w) = {tuple(fused.shape)} it "
                f"takes neighbours (b, n, c, h, w) = {(b, self.frames, *rest)}, got {tuple(neighbours.shape)}; make it "
                "with the network's number of frames, and take both from places of one size"
            )

    def _embed(self, frames: Tensor) -> Tensor:
        return self.theta(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def _confidence(self, fused: Tensor, embedded: Tensor) -> Tensor:
        """Eq. 1: (b, n, h, w), in float32 or better, since the products may exceed what float16 holds."""
        reference = self.delta(fused).to(_precise(fused)).unsqueeze(1)
        return (embedded * reference).sum(2).sigmoid()

    def _weigh(self, fused: Tensor, neighbours: Tensor, confidence: Tensor) -> Tensor:
        """Eq. 2, the pyramid, and eq. 3."""
        weighted = neighbours * confidence.unsqueeze(2).to(neighbours.dtype)
        level1 = lrelu(self.level1(weighted.flatten(1, 2)))
        level2 = lrelu(self.level2(max_and_mean(level1)))
        level3 = lrelu(self.level3(max_and_mean(lrelu(self.embed2(level2)))))
        level2 = lrelu(self.smooth2(level2)) + _enlarge(lrelu(self.smooth3(level3)), level2)
        level1 = level1 + _enlarge(lrelu(self.merge2(level2)), level1)
        logit = self.alpha(level1)
        beta = self.beta(lrelu(self.beta_hidden(logit)))
        alpha = 2 * logit.to(_precise(fused)).sigmoid()  # doubled: a sigmoid starts near 1/2
        return (alpha * fused + beta).to(fused.dtype)


class EFST(nn.Module):
    """Early fusion with spatio-temporal weights: a 1x1 convolution over all frames, and `SpatioTemporalFusion` on it.

    The levels of a network's features share one EFST, as in STVUN: call it once a level.

    Args:
        channels: width c of the features.
        frames: number n of frames.
        zero_init: start as the early fusion alone; False to train a network from scratch, as STVUN does.

    Raises:
        ValueError: in a call, another number of frames.

    Shape:
        features: (b, n, c, h, w), any h and w -> (b, c, h, w)
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = tuple(
        (pattern.replace("^", r"^ff\."), f"fusion.{ours}") for pattern, ours in SpatioTemporalFusion.official_names
    )

    def __init__(self, channels: int, frames: int = 7, zero_init: bool = True) -> None:
        super().__init__()
        self.early_fusion = nn.Conv2d(frames * channels, channels, 1)
        self.fusion = SpatioTemporalFusion(channels, frames, zero_init)

    def forward(self, features: Tensor) -> Tensor:
        """The fused feature, (b, c, h, w)."""
        return self.refine(features)[0]

    def refine(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The fused feature (b, c, h, w), and the confidence maps (b, n, h, w) in [0, 1]."""
        if features.shape[1] != self.fusion.frames:
            raise ValueError(
                f"this EFST was made for frames={self.fusion.frames}, got {features.shape[1]} in "
                f"{tuple(features.shape)}; make it with the number of frames"
            )
        return self.fusion.refine(self.early_fusion(features.flatten(1, 2)), features)

    def maps(self, features: Tensor, *, at: tuple[int, int, int] | None = None) -> Maps:
        """The confidence in each frame, (h, w) in [0, 1], of the first of a batch, for pictures (fig. 6).

        Args:
            features: (b, n, c, h, w).
            at: not used: every pixel of all frames is shown.
        """
        return {"confidence": over_time(self.refine(features[:1])[1][0], self.fusion.frames // 2)}


class EFSTPlugin(Plugin):
    """A `SpatioTemporalFusion` at each site: the backbone's own fused feature is E.

    At a frame site of a window network the neighbours are what the site gives, `frames` of them; at a clip site the
    frames of that clip around each. The confidence maps of a pass lie in `context.memo[plugin, site, t]`, detached:
    (b, n, h, w) at a frame site, where t is the site's time step (the centre of a window), and (b, t, n, h, w) at a
    clip site, where t is None.

    Args:
        channels: width of the sites.
        sites: where it goes; `fused` by default.
        frames: n, that of a window network's window; recurrent networks may have any.
        neighbours: name of a clip site to take the neighbours from instead, such as `aligned` or `features`, as the
            plug-ins attached before leave it. It becomes one of the plug-in's sites, where nothing is changed.
        zero_init: as in `SpatioTemporalFusion`.

    Raises:
        ValueError: `sites` has nothing but the neighbours; in a pass, neighbours that are missing or do not fit.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("fused",)

    def __init__(
        self,
        channels: int,
        *,
        sites: Sequence[str] | None = None,
        frames: int = 5,
        neighbours: str | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, sites=sites)
        self.neighbours = neighbours
        refined = [site for site in self.sites if site != neighbours]
        if not refined:
            raise ValueError(
                f"sites={self.sites} is where neighbours={neighbours!r} come from, which is left unchanged; name the "
                "site to refine, such as 'fused', too"
            )
        self.at = nn.ModuleDict({site: SpatioTemporalFusion(channels, frames, zero_init) for site in refined})
        self.sites = (*refined, neighbours) if neighbours else tuple(refined)

    def choose_sites(self, known: Mapping[str, SiteSpec]) -> tuple[str, ...]:
        """The default site if it is among `known`; where the neighbours have a site of their own, both must be."""
        return self.sites if self.neighbours else super().choose_sites(known)

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine a feature, (b, c, h, w) or (b, t, c, h, w), of that shape and dtype.

        Raises:
            ValueError: neighbours that are missing or do not fit.
        """
        if site == self.neighbours:
            if feature.ndim != 5:
                raise ValueError(f"neighbours={site!r} is a frame site; name a clip site, which holds all frames")
            context.memo[self, site, None] = feature
            return feature
        neighbours = self._neighbours(feature, context, site, given)
        module: SpatioTemporalFusion = self.at[site]  # type: ignore[assignment]
        if feature.ndim == 5:
            refined, confidence = module.refine_clip(feature, neighbours)
        elif self.neighbours and context.window is None and t is not None:  # a recurrent network: a clip of any length
            refined, confidence = module.refine_frame(feature, neighbours, t)
        else:
            refined, confidence = module.refine(feature, neighbours)
        context.memo[self, site, t] = confidence.detach()
        return refined

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
        """The confidence in each of the frames around, (h, w) in [0, 1] (fig. 6), as the pass had it."""
        if site == self.neighbours:
            return {}
        confidence: Tensor = context.memo[self, site, t][0]
        planes = confidence[at[0]] if feature.ndim == 5 else confidence
        return at_site({"confidence": over_time(planes, len(planes) // 2)}, site)

    def _neighbours(self, feature: Tensor, context: Context, site: str, given: Mapping[str, Any]) -> Tensor:
        if self.neighbours:
            if (self, self.neighbours, None) not in context.memo:
                raise ValueError(
                    f"EFST takes its neighbours from site {self.neighbours!r}, which the network reaches only after "
                    f"{site!r}, if at all; name a clip site before it"
                )
            return context.memo[self, self.neighbours, None]
        if feature.ndim == 5:
            return feature
        if "neighbours" not in given:
            raise ValueError(
                f"EFST needs the features of all frames, and site {site!r} gives no neighbours; name the clip site "
                "they are at, EFSTPlugin(..., neighbours='aligned'), or a site that gives them, such as EDVR's 'fused'"
            )
        return given["neighbours"]


def _precise(x: Tensor) -> torch.dtype:
    """float32, or the dtype of `x` where that is better."""
    return torch.promote_types(x.dtype, torch.float32)


def _enlarge(x: Tensor, like: Tensor) -> Tensor:
    """Twice the size, bilinear, cut to that of `like`: an odd size keeps the pixels where an even one has them."""
    h, w = like.shape[-2:]
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., :h, :w]
