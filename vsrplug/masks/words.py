"""One word a pixel: 64 masks of a frame as the bits of one 64-bit integer, the first mask in the lowest bit."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST = 64  # masks of a frame; the paper's 8 x 8 grid of points

Words = NDArray[np.uint64]


def pack(masks: Tensor) -> Words:
    """Masks (t, m, h, w), 0 or 1, as words (t, h, w).

    Raises:
        ValueError: the masks are not (t, m, h, w), or m is more than 64.
    """
    if masks.ndim != 4 or masks.shape[1] > MOST:
        raise ValueError(
            f"a pixel's word holds up to {MOST} masks (t, m, h, w), got {tuple(masks.shape)}; keep the largest {MOST}"
        )
    t, _, h, w = masks.shape
    octets = np.zeros((t, h, w, 8), np.uint8)
    packed = np.packbits(masks.detach().cpu().numpy() > 0.5, axis=1, bitorder="little")
    octets[..., : packed.shape[1]] = np.moveaxis(packed, 1, -1)
    return octets.view("<u8")[..., 0]


def unpack(words: Tensor, count: int) -> Tensor:
    """The first `count` masks, (..., count, h, w) bool, of words (..., h, w) int64; on the words' device.

    Raises:
        TypeError: the words are not int64.
    """
    if words.dtype != torch.int64:
        raise TypeError(f"words of masks are int64, got {words.dtype}")
    octets = words.contiguous()[..., None].view(torch.uint8).movedim(-1, -3)[..., : -(-count // 8), :, :]
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=words.device).view(8, 1, 1)
    planes = octets.contiguous().unsqueeze(-3) & bits
    return planes.ne(0).flatten(-4, -3)[..., :count, :, :]


def as_tensor(words: Words) -> Tensor:
    """The same words as int64, the type that torch flips, stacks and sends to a device."""
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64))


def frame_hash(frame: Tensor) -> str:
    """32 hexadecimal digits of a frame (3, h, w) in [0, 1]: its size and its levels, rounded to 8 bits."""
    levels = (frame.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8)
    digest = hashlib.blake2b(repr(tuple(levels.shape)).encode(), digest_size=16)
    digest.update(levels.contiguous().numpy().tobytes())
    return digest.hexdigest()
