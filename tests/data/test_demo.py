"""Photographs in motion: repeatable, honest about their motion, and never the same picture in both splits."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from inspect import signature
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import vsrplug.conf
from vsrplug.context import Flows
from vsrplug.data import _canvas
from vsrplug.data._motion import Path, random_path, true_flows
from vsrplug.data._scene import Layer, random_scene, render
from vsrplug.data.demo import PHOTOGRAPHS, DemoClip, DemoClips, photographs

SMALL = {"clips": 6, "frames": 4, "size": (64, 96)}


def moving(shift: np.ndarray, angle: float = 0.0, zoom: float = 0.0, tilt: tuple[float, float] = (0.0, 0.0)) -> Path:
    steps = len(shift)
    ramp = np.arange(steps) - 1.0
    return Path(shift, ramp * angle, ramp * zoom, np.tile(tilt, (steps, 1)))


def warp(frame: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """`frame` (3, h, w) sampled at p + flow (2, h, w), and which places lie inside it. Bilinear, by hand."""
    height, width = frame.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x + flow[0].double(), y + flow[1].double()
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = x.clamp(0, width - 1 - 1e-6), y.clamp(0, height - 1 - 1e-6)
    left, top = x.floor().long(), y.floor().long()
    a, b = x - left, y - top
    value = sum(
        weight * frame[:, top + dy, left + dx]
        for dy, dx, weight in (
            (0, 0, (1 - a) * (1 - b)), (0, 1, a * (1 - b)), (1, 0, (1 - a) * b), (1, 1, a * b),
        )
    )  # fmt: skip
    return value, inside


def digest(clip: DemoClip) -> str:
    return hashlib.sha256(clip.pixels.numpy().tobytes() + clip.flows(4).backward.numpy().tobytes()).hexdigest()


def test_a_clip_depends_on_seed_split_and_index_alone() -> None:
    ahead = DemoClips(**SMALL)
    digests = [digest(clip) for clip in ahead]
    behind = DemoClips(**SMALL | {"clips": 9})
    assert [digest(behind[i]) for i in range(5, -1, -1)] == digests[::-1]
    assert len(set(digests)) == 6
    assert digest(DemoClips(**SMALL, seed=1)[0]) != digests[0]
    assert digest(DemoClips("test", **SMALL)[0]) != digests[0]


def test_another_process_renders_the_same() -> None:
    code = (
        "import hashlib, torch; torch.set_num_threads(2); from vsrplug.data.demo import DemoClips;"
        f"clip = DemoClips(**{SMALL!r})[3];"
        "print(hashlib.sha256(clip.pixels.numpy().tobytes() + clip.flows(4).backward.numpy().tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(DemoClips(**SMALL)[3])


def test_clips_are_kept_and_pickled_with_what_was_rendered() -> None:
    clips = DemoClips(**SMALL)
    assert clips[1] is clips[1]
    assert clips[-1] is clips[5]
    assert [clip.name for clip in clips[1:3]] == ["train_0001", "train_0002"]
    with pytest.raises(IndexError):
        clips[6]
    copy = pickle.loads(pickle.dumps(clips))
    assert digest(copy[1]) == digest(clips[1])


def test_frames_are_the_pixels_in_unit_range() -> None:
    clip = DemoClips(**SMALL)[0]
    assert len(clip) == 4
    assert clip.pixels.shape == (4, 3, 64, 96)
    assert clip.pixels.dtype == torch.uint8
    part = list(clip.frames(1, 3))
    assert torch.equal(torch.stack(part), clip.pixels[1:3].float() / 255)
    assert len(list(clip.frames(2))) == 2
    assert [flow.shape for flow in clip.flows(4)] == [(3, 2, 16, 24)] * 2
    assert clip.flows(4) is clip.flows(4)


def test_a_clip_of_one_frame_has_no_flow() -> None:
    clip = DemoClips(clips=1, frames=1, size=(64, 64))[0]
    assert clip.flows(2).forward.shape == (0, 2, 32, 32)


def test_render_all_renders_all(capsys: pytest.CaptureFixture[str]) -> None:
    clips = DemoClips(**SMALL).render_all(progress=False)
    assert capsys.readouterr().out == ""
    assert digest(clips[2]) == digest(DemoClips(**SMALL)[2])


def test_the_splits_share_no_photograph() -> None:
    files = {split: {p.file for p in PHOTOGRAPHS if p.split == split} for split in ("train", "test")}
    assert len(files["train"]) + len(files["test"]) == len(PHOTOGRAPHS)
    assert not files["train"] & files["test"]
    shown = {split: {picture.tobytes() for picture in photographs(split)} for split in ("train", "test")}  # type: ignore[arg-type]
    assert len(shown["train"]) == len(files["train"]) == 11
    assert len(shown["test"]) == len(files["test"]) == 2
    assert not shown["train"] & shown["test"]


def test_photographs_are_those_that_scikit_image_carries_and_frees() -> None:
    import skimage.data

    free = {"public domain", "CC0", "no known copyright restrictions"}
    function = {"ihc": "immunohistochemistry"}
    for photograph in PHOTOGRAPHS:
        path = FilePath(skimage.data.__file__).parent / photograph.file
        assert path.is_file(), photograph.file
        stated = getattr(skimage.data, function.get(path.stem, path.stem)).__doc__.lower().replace("\n", " ")
        assert photograph.licence in free
        needle = "cc0" if photograph.licence == "CC0" else photograph.licence.lower()
        assert needle in " ".join(stated.split()), photograph.file


def test_true_flow_is_the_homography_at_every_pixel_centre() -> None:
    """Against a float64 loop that moves each LR pixel's centre by itself, for two layers."""
    rng = np.random.default_rng(3)
    paths = [random_path(rng, 3, 4.0), random_path(rng, 3, 9.0)]
    matrices = np.stack([path.matrices(np.arange(3.0)) for path in paths], axis=1)
    owner = torch.from_numpy(rng.integers(0, 2, (3, 16, 24)).astype(np.uint8))
    for scale in (1, 2, 4):
        flows = true_flows(matrices, owner, scale)
        for i in range(2):
            for name, source, target in (("backward", i, i + 1), ("forward", i + 1, i)):
                found = getattr(flows, name)[i]
                for row in range(16 // scale):
                    for column in range(24 // scale):
                        layer = int(owner[source, row * scale + scale // 2, column * scale + scale // 2])
                        x, y = (column + 0.5) * scale - 0.5 - 23 / 2, (row + 0.5) * scale - 0.5 - 15 / 2
                        plane = np.linalg.solve(matrices[source, layer], [x, y, 1.0])
                        moved = matrices[target, layer] @ plane
                        wanted = (moved[:2] / moved[2] - [x, y]) / scale
                        np.testing.assert_allclose(found[:, row, column].numpy(), wanted, atol=2e-5)


def texture(height: int, width: int) -> Tensor:
    rng = np.random.default_rng(0)
    plane = _canvas.piece(rng, photographs("train"), height, width)
    return torch.from_numpy(np.concatenate([plane, np.ones_like(plane[..., :1])], 2)).permute(2, 0, 1).contiguous()


def test_a_layer_moved_by_whole_pixels_moves_by_whole_pixels() -> None:
    shift = np.outer(np.arange(-1, 4), [3.0, -2.0])
    pixels, owner = render([Layer(texture(200, 260), moving(shift))], 3, (64, 96))
    assert not owner.any()
    for t in range(2):  # what is at (x, y) is at (x + 3, y - 2) one frame later
        torch.testing.assert_close(pixels[t + 1, :, :-2, 3:], pixels[t, :, 2:, :-3], atol=2e-4, rtol=0)
    flows = true_flows(moving(shift).matrices(np.arange(3.0))[:, None], owner, 4)
    torch.testing.assert_close(flows.backward, torch.tensor([0.75, -0.5]).view(1, 2, 1, 1).expand(2, 2, 16, 24))
    torch.testing.assert_close(flows.forward, -flows.backward)


def test_an_occluder_hides_the_background_and_carries_its_own_flow() -> None:
    still, shift = np.zeros((4, 2)), np.outer(np.arange(-1, 3), [4.0, 0.0])
    square = torch.zeros(4, 41, 41)
    square[:, 1:-1, 1:-1] = 1.0
    pixels, owner = render([Layer(texture(128, 192), moving(still)), Layer(square, moving(shift))], 2, (64, 96))
    assert owner[0].sum() == pytest.approx(19.5**2, abs=25)
    torch.testing.assert_close(pixels[0][:, owner[0].bool()].mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    flow = true_flows(np.stack([moving(p).matrices(np.arange(2.0)) for p in (still, shift)], axis=1), owner, 2).backward
    seen = owner[0, 1::2, 1::2].bool()
    assert torch.all(flow[0, 0, seen] == 2.0)
    assert torch.all(flow[0, :, ~seen] == 0.0)


def test_an_open_shutter_is_the_mean_along_the_path() -> None:
    shift = np.outer(np.arange(-1, 4), [8.0, 0.0])
    layer = Layer(texture(200, 260), moving(shift))
    sharp, _ = render([layer], 3, (64, 96))
    blurred, _ = render([layer], 3, (64, 96), shutter=0.5)
    step = F.pad(sharp[1:2], (2, 2, 0, 0), mode="replicate").unfold(3, 5, 1).mean(-1)[0]
    inner = (slice(None), slice(None), slice(4, -4))
    assert (blurred[1] - step)[inner].pow(2).mean() < 0.2 * (sharp[1] - step)[inner].pow(2).mean()


@pytest.mark.parametrize("split", ["train", "test"])
def test_warping_by_the_true_flow_gives_the_frame(split: str) -> None:
    """But where something is hidden or uncovered between the two frames: there the flow forth and back disagree."""
    warped, unmoved = [], []
    for index in range(6):
        rng = np.random.default_rng([7, index])
        layers = random_scene(rng, photographs(split), 3, (96, 128))  # type: ignore[arg-type]
        pixels, owner = render(layers, 3, (96, 128))
        matrices = np.stack([layer.path.matrices(np.arange(3.0)) for layer in layers], axis=1)
        flows: Flows = true_flows(matrices, owner, 1)
        for i in range(2):
            for flow, back, source, target in (
                (flows.backward[i], flows.forward[i], i, i + 1),
                (flows.forward[i], flows.backward[i], i + 1, i),
            ):
                found, inside = warp(pixels[target].double(), flow)
                returned, _ = warp(back.double(), flow)
                seen = inside & ((returned + flow).norm(dim=0) < 0.1)
                warped.append(float((found - pixels[source])[:, seen].abs().mean()))
                unmoved.append(float((pixels[target] - pixels[source])[:, seen].abs().mean()))
    assert np.mean(warped) < 0.35 * np.mean(unmoved)


def test_motion_is_small_and_large() -> None:
    speeds = []
    for index in range(100):
        path = random_scene_path(index)
        speeds.append(np.linalg.norm(np.diff(path.shift, axis=0), axis=1).mean())
    assert min(speeds) < 0.5
    assert max(speeds) > 5
    assert 1 < np.median(speeds) < 4


def random_scene_path(index: int) -> Path:
    rng = np.random.default_rng(index)
    return random_path(rng, 8, float(np.exp(rng.uniform(np.log(0.2), np.log(10)))))


def test_the_yaml_has_the_constructors_names_and_defaults() -> None:
    path = FilePath(vsrplug.conf.__path__[0]) / "data" / "demo.yaml"
    given = yaml.safe_load(path.read_text())
    assert given.pop("_target_") == "vsrplug.data.DemoClips"
    defaults = {name: parameter.default for name, parameter in signature(DemoClips).parameters.items()}
    assert given == defaults | {"size": list(defaults["size"])}


def test_errors_say_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"split must be 'train' or 'test', got 'val'"):
        DemoClips("val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 1, got clips=0 and frames=14"):
        DemoClips(clips=0)
    with pytest.raises(ValueError, match=r"multiples of 4 from 16 up, got \(190, 256\); try \(192, 256\)"):
        DemoClips(size=(190, 256))
    clip = DemoClips(clips=1, frames=2, size=(64, 64))[0]
    with pytest.raises(ValueError, match=r"scale must divide the frame of 64 x 64 pixels, got 3; try 4"):
        clip.flows(3)
