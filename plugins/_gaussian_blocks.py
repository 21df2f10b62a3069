"""Gaussian-weighted attention in tiles of queries and blocks of keys: exact, in memory linear in the image.

Pixels are last but one throughout: query (b, h, w, c), key (b, t, h, w, c), value (b, t, h, w, c'), in float32 or
float64. Within a tile there are n queries, and m keys in a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAMPLE = 64  # keys of a frame whose largest score stands in for the largest of all
OVERFLOW = 2.0**90  # float32 reaches 2**127; the rest is for the values that are weighted
LOG2_E = math.log2(math.e)  # scores are kept to base 2: torch's exp2 takes a third of the time of its exp


def sizes(device: torch.device, weighting: str) -> tuple[int, int]:
    """Rows and columns of queries taken together, at most, and scores in hand at a time.

    Measured on two cores with 1 MiB of second-level cache each, which the scores fill; where only near keys count,
    smaller tiles have fewer of them. A GPU wants more work a call.
    """
    if device.type != "cpu":
        return 32, 2**24
    return 16 if weighting == "gaussian_of_softmax" else 12, 2**19


class Tile(NamedTuple):
    """Queries taken together, and which keys are near them."""

    rows: slice
    columns: slice
    near: slice  # of the keys in the order of the strip, see `_in_order`
    squared: Tensor  # (n, near keys), squares of distances

    def of(self, image: Tensor) -> Tensor:
        """Its part of (h, w, c), as (n, c)."""
        return image[self.rows, self.columns].flatten(0, 1)

    def put(self, image: Tensor, part: Tensor) -> None:
        """Write (n, c) to its place in (h, w, c)."""
        place = image[self.rows, self.columns]
        place.copy_(part.view_as(place))

    def table(self, sigma: Tensor, weighting: str) -> Tensor:
        """G of every query and near key, or its logarithm to base 2 where that is added to the scores."""
        logarithm = self.squared * (-LOG2_E / (2 * _positive(sigma) ** 2))
        return logarithm if weighting == "softmax_of_gaussian" else logarithm.exp2_()

    def blocks(self, keys: Tensor, weighting: str) -> Iterator[tuple[slice, slice | None]]:
        """The near keys in blocks, each with its columns of `table`, then all others where the softmax needs them."""
        size = max(1, sizes(keys.device, weighting)[1] // len(self.squared))
        for start in range(self.near.start, self.near.stop, size):
            stop = min(start + size, self.near.stop)
            yield slice(start, stop), slice(start - self.near.start, stop - self.near.start)
        for first, last in ((0, self.near.start), (self.near.stop, len(keys))):
            for start in range(first, last, size) if weighting == "gaussian_of_softmax" else ():
                yield slice(start, min(start + size, last)), None


def forward(
    query: Tensor, key: Tensor, value: Tensor, sigma: Tensor, weighting: str, eps: float
) -> tuple[Tensor, Tensor]:
    """`gaussian_attention` on pixels-last tensors.

    Frames are taken one at a time: as a batch of matrices, 7 would be dealt to 2 threads as 4 and 3.

    Returns:
        The result (b, t, h, w, c'), and the logarithm to base 2 of what the softmax divides by, (b, t, h, w, 1).
    """
    out, lse = torch.empty_like(value), key.new_zeros((*key.shape[:-1], 1))
    scaled = query if weighting == "product" else query * LOG2_E
    everything = weighting == "gaussian_of_softmax"
    with torch.autocast(query.device.type, enabled=False):
        for i, columns, reach in _strips(key, sigma, weighting, eps):
            keys, values = _in_order(key[i], reach, everything), _in_order(value[i], reach, False)
            for tile in _tiles(key, columns, reach, sigma, weighting, eps):
                table = tile.table(sigma, weighting)
                for t in range(key.shape[1]):
                    q, offset = tile.of(scaled[i]), lse.new_zeros(())
                    # A softmax is the same whatever is subtracted from all scores, as long as its sum stays within the
                    # range of the dtype. The largest score would take one more pass over all of them; any one of them
                    # keeps the sum from vanishing, so a likely one is tried first.
                    if weighting == "gaussian_of_softmax":
                        offset = (q @ keys[t, :: -(-keys.shape[1] // SAMPLE)].T).amax(-1, keepdim=True)
                    elif weighting == "softmax_of_gaussian":
                        offset = (q * tile.of(key[i, t])).sum(-1, keepdim=True)  # the query's own place: there G is one
                    weighted, total = _attend(q, keys[t], values[t], offset, tile, table, weighting)
                    if not total.max() < OVERFLOW:
                        offset = _largest(q, keys[t], tile, table, weighting)
                        weighted, total = _attend(q, keys[t], values[t], offset, tile, table, weighting)
                    tile.put(out[i, t], weighted / total)
                    tile.put(lse[i, t], total.log2() + offset)
    return out, lse


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, offset: Tensor, tile: Tile, table: Tensor, weighting: str
) -> tuple[Tensor, Tensor]:
    """The sum of weights times values (n, c'), and what the softmax divides it by (n, 1)."""
    weighted = values.new_zeros(len(query), values.shape[-1])
    total = keys.new_full((len(query), 1), float(weighting == "product"))
    for block, near in tile.blocks(keys, weighting):
        weights = _before_gaussian(query, keys[block], offset, table, near, weighting)
        if weighting != "product":
            total += weights.sum(-1, keepdim=True)
        if near is not None:
            if weighting != "softmax_of_gaussian":
                weights *= table[:, near]
            weighted.addmm_(weights, values[block])
    return weighted, total


def _before_gaussian(
    query: Tensor, keys: Tensor, offset: Tensor, table: Tensor, near: slice | None, weighting: str
) -> Tensor:
    """What is summed by the softmax, relative to 2**offset, or for a product the scores: (n, m)."""
    weights = torch.addmm(-offset, query, keys.T)
    if weighting == "softmax_of_gaussian":
        weights += table[:, near]
    return weights if weighting == "product" else weights.exp2_()


def _largest(query: Tensor, keys: Tensor, tile: Tile, table: Tensor, weighting: str) -> Tensor:
    """The largest score of each query, (n, 1)."""
    largest = keys.new_full((), -math.inf)
    for block, near in tile.blocks(keys, weighting):
        scores = query @ keys[block].T
        if weighting == "softmax_of_gaussian":
            scores += table[:, near]
        largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
    return largest


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sigma: Tensor,
    out: Tensor,
    lse: Tensor,
    weighting: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sigma; the weights are computed again, block by block.

    With P what the softmax gives, D = grad . out and dA = grad . value, the gradient of a score is
        gaussian_of_softmax: P G dA - P D, the second term (of the softmax's own sum) for all keys
        softmax_of_gaussian: P (dA - D), here G is within P
        product: G dA
    and that of log G, which times d^2 / sigma^3 gives that of sigma, the same without P D, and times s for a product.
    """
    dquery, dkey, dvalue = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    moment = query.new_zeros((), dtype=torch.float64)
    scaled = query if weighting == "product" else query * LOG2_E
    everything = weighting == "gaussian_of_softmax"
    with torch.autocast(query.device.type, enabled=False):
        drop = (grad * out).sum(-1, keepdim=True)
        for i, columns, reach in _strips(key, sigma, weighting, eps):
            keys, values = _in_order(key[i], reach, everything), _in_order(value[i], reach, False)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in _tiles(key, columns, reach, sigma, weighting, eps):
                table, q, dq = tile.table(sigma, weighting), tile.of(query[i]), torch.zeros_like(tile.of(query[i]))
                for t in range(key.shape[1]):
                    offset, g, d = tile.of(lse[i, t]), tile.of(grad[i, t]), tile.of(drop[i, t])
                    for block, near in tile.blocks(keys[t], weighting):
                        weights = _before_gaussian(tile.of(scaled[i]), keys[t, block], offset, table, near, weighting)
                        if near is None:
                            dscores = weights.mul_(-d)
                        else:
                            dweights = g @ values[t, block].T
                            if weighting == "softmax_of_gaussian":
                                dweights -= d
                                dvalues[t, block].addmm_(weights.T, g)
                            else:
                                dweights *= table[:, near]
                                dvalues[t, block].addmm_((weights * table[:, near]).T, g)
                            dlog = weights * dweights
                            moment += (dlog * tile.squared[:, near]).sum()
                            if weighting == "gaussian_of_softmax":
                                dscores = dlog.sub_(weights.mul_(d))
                            else:
                                dscores = dweights if weighting == "product" else dlog
                        dq.addmm_(dscores, keys[t, block])
                        dkeys[t, block].addmm_(dscores.T, q)
                tile.put(dquery[i], dq)
            _add_in_order(dkey[i], reach, everything, dkeys)
            _add_in_order(dvalue[i], reach, False, dvalues)
    dsigma = moment / _positive(sigma).double() ** 3 * sigma.sign()
    return dquery, dkey, dvalue, dsigma.to(sigma.dtype).view_as(sigma)


def operations(key: Tensor, channels: int, sigma: Tensor, weighting: str, eps: float) -> int:
    """Of the matrix products that `forward` carries out, a multiplication and an addition counting as two.

    Only the shapes of the clip are read, and the value of sigma. The second attempt after an overflow is left out.

    Args:
        key: (b, t, h, w, c), the query being c wide too.
        channels: c', width of the values.
    """
    b, t, h, w, c = key.shape
    step = -(-h * w // SAMPLE)
    done = 0
    for columns, across in _spans(w, key, sigma, weighting, eps):
        for rows, down in _spans(h, key, sigma, weighting, eps):
            near = (across.stop - across.start) * (down.stop - down.start)
            scores = h * w + -(-h * w // step) if weighting == "gaussian_of_softmax" else near
            done += (columns.stop - columns.start) * (rows.stop - rows.start) * (scores * c + near * channels)
    return 2 * b * t * done


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.weighting, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output)


def _propagate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_blocked_backward(grad.contiguous(), *ctx.saved_tensors, ctx.weighting, ctx.eps), None, None)


# Operators of their own, which torch.compile takes as they are: it would unroll the loops.
blocked = torch.library.custom_op("vsrplug::gaussian_attention", forward, mutates_args=())
_blocked_backward = torch.library.custom_op("vsrplug::gaussian_attention_backward", backward, mutates_args=())
blocked.register_autograd(_propagate, setup_context=_save)
blocked.register_fake(lambda q, k, v, sigma, weighting, eps: (torch.empty_like(v), k.new_empty((*k.shape[:-1], 1))))
_blocked_backward.register_fake(
    lambda grad, q, k, v, sigma, out, lse, weighting, eps: tuple(torch.empty_like(x) for x in (q, k, v, sigma))
)


def _positive(sigma: Tensor) -> Tensor:
    """Its size as a scalar; never zero, where only a query's own place would count."""
    return sigma.abs().clamp(min=1e-6).reshape(())


def _reach(size: int, sigma: Tensor, eps: float) -> int:
    """Pixels beyond which G is below eps, `size` at most."""
    radius = _positive(sigma).item() * math.sqrt(-2 * math.log(eps)) if eps else math.inf
    return int(min(size, radius))  # in this order a sigma that is no number gives a result that is none, and no error


def _spans(size: int, key: Tensor, sigma: Tensor, weighting: str, eps: float) -> Iterator[tuple[slice, slice]]:
    """An axis of the image in equal parts, of queries, each with the keys that are near them."""
    reach = _reach(size, sigma, eps)
    step = -(-size // -(-size // sizes(key.device, weighting)[0]))
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(start, stop), slice(max(start - reach, 0), min(stop + reach, size))


def _strips(key: Tensor, sigma: Tensor, weighting: str, eps: float) -> Iterator[tuple[int, slice, slice]]:
    """Every clip of the batch and column of tiles: the index of the clip, the columns of queries and of near keys."""
    for i in range(len(key)):
        for columns, near in _spans(key.shape[3], key, sigma, weighting, eps):
            yield i, columns, near


def _tiles(key: Tensor, columns: slice, near: slice, sigma: Tensor, weighting: str, eps: float) -> Iterator[Tile]:
    """The tiles of one strip, from the top."""
    y, x = (torch.arange(size, device=key.device, dtype=key.dtype) for size in key.shape[2:4])
    across, width = (x[columns, None] - x[near]).square(), near.stop - near.start
    for rows, reached in _spans(key.shape[2], key, sigma, weighting, eps):
        down = (y[rows, None] - y[reached]).square()
        squared = (down[:, None, :, None] + across[:, None, :]).flatten(2).flatten(0, 1)
        yield Tile(rows, columns, slice(reached.start * width, reached.stop * width), squared)


def _parts(image: Tensor, near: slice, everything: bool) -> Iterator[tuple[slice, slice]]:
    """Columns of (t, h, w, c) and where they stand in (t, h w, c): the strip's come first, then, if asked, the others.

    So what is near to a tile of the strip is one slice, and what is not is two.
    """
    h, w = image.shape[1:3]
    start = 0
    for columns in (near, slice(0, near.start), slice(near.stop, w)) if everything else (near,):
        stop = start + h * (columns.stop - columns.start)
        yield columns, slice(start, stop)
        start = stop


def _in_order(image: Tensor, near: slice, everything: bool) -> Tensor:
    """(t, h, w, c) -> (t, h w, c), the strip's columns first; without the others (t, h w', c)."""
    t, h, _, c = image.shape
    parts = list(_parts(image, near, everything))
    ordered = image.new_empty(t, parts[-1][1].stop, c)
    for columns, place in parts:
        ordered[:, place].view(t, h, -1, c).copy_(image[:, :, columns])
    return ordered


def _add_in_order(image: Tensor, near: slice, everything: bool, ordered: Tensor) -> None:
    """Add what `_in_order` would give back to its place."""
    for columns, place in _parts(image, near, everything):
        image[:, :, columns] += ordered[:, place].view_as(image[:, :, columns])
