"""Folders of frames: exact values for every kind of image, and one clear line for every kind of damage."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vsrplug.data import FrameFolder
from vsrplug.data.frame_folder import read_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(6, 8, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def save_16_bit(path: Path, array: np.ndarray) -> Path:
    """A PNG of 16 bits a channel, (h, w, 1 to 4), written by hand: PIL writes no such RGB."""
    height, width, channels = array.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    return path


def planes(array: np.ndarray, top: int) -> torch.Tensor:
    return torch.from_numpy((array.astype(np.float64) / top).astype(np.float32)).permute(2, 0, 1)


def test_frames_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for t in (1, 2, 9, 10, 11, 100):
        save(tmp_path / "clip" / f"frame_{t}.png", np.full((4, 4, 3), t, np.uint8))
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    (tmp_path / "clip" / "._frame_3.png").write_text("no frame either")
    clip = FrameFolder(tmp_path / "clip")
    assert (clip.name, len(clip), clip.size) == ("clip", 6, (4, 4))
    assert [round(float(frame.mean()) * 255) for frame in clip.frames()] == [1, 2, 9, 10, 11, 100]
    assert [round(float(frame.mean()) * 255) for frame in clip.frames(2, 4)] == [9, 10]


def test_only_the_frames_asked_for_are_opened(tmp_path: Path) -> None:
    for t in range(4):
        save(tmp_path / f"{t}.png", RGB)
    (tmp_path / "3.png").write_bytes(b"damaged")
    assert len(list(FrameFolder(tmp_path).frames(0, 3))) == 3


def test_8_bit_rgb_is_exact(tmp_path: Path) -> None:
    frame = read_image(save(tmp_path / "a.png", RGB))
    assert frame.dtype == torch.float32
    assert frame.is_contiguous()
    assert torch.equal(frame, planes(RGB, 255))


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    assert torch.equal(read_image(save(tmp_path / "a.png", RGB[..., 0])), planes(RGB[..., :1].repeat(3, 2), 255))


def test_one_bit_becomes_rgb(tmp_path: Path) -> None:
    black_and_white = (RGB[..., 0] > 127).astype(np.uint8)[..., None].repeat(3, 2)
    assert torch.equal(read_image(save(tmp_path / "a.png", RGB[..., 0] > 127)), planes(black_and_white, 1))


def test_palette_becomes_rgb(tmp_path: Path) -> None:
    few = RGB // 128 * 255
    path = tmp_path / "a.png"
    Image.fromarray(few).quantize(8).save(path)
    with Image.open(path) as image:
        assert image.mode == "P"
        expected = np.asarray(image.convert("RGB"))
    assert torch.equal(read_image(path), planes(expected, 255))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_kept_exactly(tmp_path: Path, channels: int) -> None:
    deep = RNG.integers(65536, size=(6, 8, channels), dtype=np.uint16)
    frame = read_image(save_16_bit(tmp_path / "a.png", deep))
    assert torch.equal(frame, planes(deep, 65535).expand(3, -1, -1))


def test_16_bit_grey_tiff(tmp_path: Path) -> None:
    deep = RNG.integers(65536, size=(6, 8), dtype=np.uint16)
    assert torch.equal(read_image(save(tmp_path / "a.tif", deep)), planes(deep[..., None].repeat(3, 2), 65535))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [2, 4])
def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path: Path, channels: int, bits: int) -> None:
    top, kind = 2**bits - 1, (np.uint8 if bits == 8 else np.uint16)
    array = RNG.integers(top + 1, size=(6, 8, channels)).astype(kind)
    array[..., -1] = top
    path = tmp_path / "a.png"
    write = save_16_bit if bits == 16 else save
    frame = read_image(write(path, array))
    assert torch.equal(frame, planes(array[..., :-1], top).expand(3, -1, -1))
    array[3, 3, -1] = top - 1
    write(path, array)
    with pytest.raises(ValueError, match=r"a\.png has transparent pixels.* flatten it first.*-alpha remove"):
        read_image(path)


def test_a_transparent_palette_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).quantize(8).save(path, transparency=0)
    with pytest.raises(ValueError, match="transparent pixels"):
        read_image(path)


def test_float_images_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", RGB[..., 0].astype(np.float32))
    with pytest.raises(ValueError, match=r"a\.tif holds float32 values; expected 8 or 16 bits a channel"):
        read_image(path)


@pytest.mark.parametrize("deep", [False, True])
def test_a_damaged_png_in_the_middle_is_named(tmp_path: Path, deep: bool) -> None:
    for t in range(5):
        noise = RNG.integers(256, size=(40, 40, 3))
        if deep:
            save_16_bit(tmp_path / f"{t:08d}.png", noise * 257)
        else:
            save(tmp_path / f"{t:08d}.png", noise.astype(np.uint8))
    damaged = tmp_path / "00000002.png"
    damaged.write_bytes(damaged.read_bytes()[:900])
    frames = FrameFolder(tmp_path).frames()
    next(frames), next(frames)
    with pytest.raises(ValueError, match=r"00000002\.png cannot be read as an image, the file may be damaged: ."):
        next(frames)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_a_first_frame_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        next(FrameFolder(tmp_path).frames())
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        _ = FrameFolder(tmp_path).size


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "0.png", RGB)
    save(tmp_path / "1.png", RGB[:5])
    with pytest.raises(ValueError, match=r"one size: .*1\.png is 5x8, but .*0\.png is 6x8"):
        list(FrameFolder(tmp_path).frames())


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images; expected files ending in .*\.png"):
        FrameFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        FrameFolder(tmp_path / "nowhere")
