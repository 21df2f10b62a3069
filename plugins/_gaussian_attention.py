"""Attention weighted by a Gaussian of the distance, without a matrix of all pairs of pixels.

In tiles and blocks (`_gaussian_blocks.py`), or by FlexAttention on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ._gaussian_blocks import blocked

Weighting = Literal["gaussian_of_softmax", "product", "softmax_of_gaussian"]


def gaussian_attention(
    query: Tensor, key: Tensor, value: Tensor, sigma: Tensor, weighting: Weighting, eps: float
) -> Tensor:
    """Attention of one frame's pixels to those of t frames, each frame by itself, weighted by distance.

    With s = q.k (not divided by sqrt(c)) and G = exp(-d^2 / 2 sigma^2), d the distance in pixels, the weights are
    `"gaussian_of_softmax"`: softmax(s) G; `"product"`: s G; `"softmax_of_gaussian"`: softmax(s + log G).

    Args:
        query: (b, c, h, w).
        key: (b, t, c, h, w).
        value: (b, t, c', h, w).
        sigma: one element, in pixels.
        weighting: one of the three.
        eps: values whose G is below it may be skipped, 0 skips none. The softmax of `"gaussian_of_softmax"` is over
            all keys nevertheless.

    Returns:
        (b, t, c', h, w) in the value's dtype, computed in float32 at least. It can be differentiated once, by all four
        tensors. Forward and backward, memory grows with h w and not with its square.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.permute(0, 2, 3, 1), key.permute(0, 1, 3, 4, 2), value.permute(0, 1, 3, 4, 2)
    # FlexAttention would add to sigma's gradient once for every pair of pixels, all at one address: blocks are faster.
    learning = torch.is_grad_enabled() and sigma.requires_grad
    if q.is_cuda and weighting != "product" and exact == torch.float32 and q.shape[-1] >= 16 and not learning:
        out = flexible(q, k, v, sigma, weighting, eps, _flex_attention())
    else:
        q, k, v = (x.to(exact).contiguous() for x in (q, k, v))
        out, _ = blocked(q, k, v, sigma.to(exact), weighting, eps)
    return out.permute(0, 1, 4, 2, 3).to(value.dtype)


def flexible(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sigma: Tensor,
    weighting: Weighting,
    eps: float,
    attend: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """`gaussian_attention` by FlexAttention; query (b, h, w, c), key (b, t, h, w, c), value (b, t, h, w, c').

    softmax(s) G is no softmax, but it is one times a number of the query's. With Z = sum_j exp(s_j) over all keys and
    Z' = sum_j exp(s_j) G_j,

        sum_j exp(s_j) / Z G_j v_j = Z' / Z sum_j exp(s_j + log G_j) / Z' v_j = exp(lse' - lse) softmax(s + log G) v

    Args:
        attend: FlexAttention, or what computes the same; it returns the log-sum-exp too.
    """
    _, t, h, w, _ = key.shape
    q = query.flatten(1, 2).unsqueeze(1).expand(-1, t, -1, -1).contiguous()  # frames take the place of heads
    k, v = key.flatten(2, 3).contiguous(), value.flatten(2, 3).contiguous()
    precision = 0.5 / sigma.detach().to(torch.promote_types(q.dtype, torch.float32)).reshape(()).square()

    def with_gaussian(score: Tensor, b: Tensor, t: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dy, dx = i // w - j // w, i % w - j % w
        return score - (dy * dy + dx * dx) * precision

    mask = _near_blocks(h, w, sigma.detach(), eps)
    out, lse_with = attend(q, k, v, score_mod=with_gaussian, block_mask=mask, scale=1.0)
    if weighting == "gaussian_of_softmax":
        _, lse = attend(q, k, v, scale=1.0)
        out = out * (lse_with - lse).exp().unsqueeze(-1).to(out.dtype)
    return out.unflatten(2, (h, w))


def _near_blocks(h: int, w: int, sigma: Tensor, eps: float, size: int = 128) -> Any:
    """The blocks of pixels that have others with G >= eps in common reach, by the boxes around them; None for all."""
    from torch.nn.attention.flex_attention import BlockMask

    if not eps:
        return None
    first = torch.arange(0, h * w, size, device=sigma.device)
    last = (first + size - 1).clamp(max=h * w - 1)
    top, bottom = first // w, last // w
    several = bottom > top  # more rows than one: the box is as wide as the image
    left, right = torch.where(several, 0, first % w), torch.where(several, w - 1, last % w)
    dy = torch.maximum(top[:, None] - bottom, top - bottom[:, None]).clamp(min=0)
    dx = torch.maximum(left[:, None] - right, left - right[:, None]).clamp(min=0)
    near = dy * dy + dx * dx <= sigma.float().reshape(()).square() * (-2 * math.log(eps))
    count = near.sum(-1, dtype=torch.int32)
    nearest_first = near.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        count[None, None], nearest_first[None, None], BLOCK_SIZE=size, seq_lengths=(h * w, h * w)
    )


@functools.cache
def _flex_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    """FlexAttention, compiled: on its own it would make the matrix of all scores."""
    from torch.nn.attention import flex_attention as flex

    compiled: Callable[..., Any] = torch.compile(flex.flex_attention)
    if not hasattr(flex, "AuxRequest"):  # before PyTorch 2.9
        return functools.partial(compiled, return_lse=True)

    def attend(*args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        out, more = compiled(*args, **keywords, return_aux=flex.AuxRequest(lse=True))
        return out, more.lse

    return attend
