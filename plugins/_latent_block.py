"""What the blocks of latent attention share: a random variable at the end, and clips as linear layers take them.

Paper: Wang, Dong, Gong, Chen, "Efficient Video Super-Resolution with Latent Attention", Computer Science 50(11A), 2023,
sections 4.3 and 6. Inside the blocks clips are b t h w c, as linear layers and attention take them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal


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
        return query + channels_third(self.output(z)).to(query.dtype), divergence

    def distribution(self, query: Tensor, *keys: Tensor) -> Normal:
        """The posterior of z, (b, t, c', h, w), for pictures: its mean, its deviation, or samples (fig. 8).

        Raises:
            ValueError: the block was made without a variance.
        """
        mean, log_variance = self._heads(query, keys)
        if log_variance is None:
            raise ValueError("a block made with variational=False has no distribution; its attention is one value")
        return Normal(channels_third(mean).to(log_variance), channels_third((log_variance / 2).exp()))

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


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)  # the paper names no slope; this is the default of the framework it used


def channels_last(clip: Tensor) -> Tensor:
    """(b, t, c, h, w) -> (b, t, h, w, c)."""
    return clip.permute(0, 1, 3, 4, 2).contiguous()


def channels_third(x: Tensor) -> Tensor:
    """(b, t, h, w, c) -> (b, t, c, h, w)."""
    return x.permute(0, 1, 4, 2, 3)


def over_clips(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(b, t, h, w, c) through what takes (b, c, t, h, w)."""
    return function(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def over_frames(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(b, t, h, w, c) through what takes (b t, c, h, w)."""
    return function(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def halved(x: Tensor) -> Tensor:
    """The maximum of 2x2 pixels, (b, t, h, w, c) -> (b, t, h/2, w/2, c), rounded up: windows may stand out."""
    return over_frames(lambda frames: F.max_pool2d(frames, 2, ceil_mode=True), x)


def doubled(enlarge: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """What `enlarge` makes of (b, t, h, w, c), cropped to `size`, the h and w from before the halving."""
    return over_frames(enlarge, x)[:, :, : size[0], : size[1]]
