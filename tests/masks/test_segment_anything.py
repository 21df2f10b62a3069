"""segment-anything really runs: a small SAM of the package's own classes, with random weights, through the command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vsrplug.commands import main
from vsrplug.masks import CachedMasks, SegmentAnything
from vsrplug.masks.cache_file import CacheFile

segment_anything = pytest.importorskip("segment_anything")
FRAMES = torch.nn.functional.interpolate(
    torch.rand(3, 3, 5, 8, generator=torch.Generator().manual_seed(0)), size=(40, 64), mode="bicubic"
).clamp(0, 1)
EVERYTHING = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}  # random weights are sure of nothing


def small_sam(checkpoint: None = None) -> nn.Module:
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    width, side, patch = 32, 128, 16
    encoder = ImageEncoderViT(
        depth=2, embed_dim=32, img_size=side, mlp_ratio=2, norm_layer=partial(nn.LayerNorm, eps=1e-6), num_heads=2,
        patch_size=patch, use_rel_pos=True, global_attn_indexes=(1,), window_size=3, out_chans=width,
    )  # fmt: skip
    prompts = PromptEncoder(width, (side // patch, side // patch), (side, side), 4)
    transformer = TwoWayTransformer(depth=1, embedding_dim=width, mlp_dim=32, num_heads=2)
    decoder = MaskDecoder(transformer_dim=width, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=16)
    return Sam(encoder, prompts, decoder)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(segment_anything.sam_model_registry, "small", small_sam)
    torch.manual_seed(3)
    network = small_sam()
    for parameter in network.parameters():  # apart from each other, so that masks are not all alike
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    torch.save(network.state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def records(checkpoint: Path, frame: torch.Tensor, **options: Any) -> list[dict[str, Any]]:
    """What the package itself says."""
    network = small_sam()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    generator = segment_anything.SamAutomaticMaskGenerator(network.eval(), points_per_side=8, **EVERYTHING | options)
    image = (frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return sorted(generator.generate(image), key=lambda record: -record["area"])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("nms", [0.7, 1.0])
def test_masks_are_the_packages_own_largest_first(checkpoint: Path, batch: int, nms: float) -> None:
    source = SegmentAnything(checkpoint, "small", batch=batch, device="cpu", box_nms_thresh=nms, **EVERYTHING)
    masks = source(FRAMES)
    assert masks.shape == (3, 64, 40, 64)
    for planes, frame in zip(masks, FRAMES, strict=True):
        expected = records(checkpoint, frame, box_nms_thresh=nms)
        assert len(expected) > 64 if nms == 1 else expected  # without suppression, more than a word has bits
        for plane, record in zip(planes, expected, strict=False):
            # a batch may round otherwise than one image, and a pixel fall on the other side of a threshold
            assert (plane.numpy() != record["segmentation"]).mean() < (0.01 if batch > 1 else 1e-9)
        assert not planes[len(expected) :].any()


@pytest.mark.parametrize("found", [0, 1, 64, 65])
def test_so_many_masks_from_the_source(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, found: int) -> None:
    source = SegmentAnything(checkpoint, "small", device="cpu")
    rng = np.random.default_rng(0)
    planes = [rng.permutation(40 * 64).reshape(40, 64) < 3 + number // 2 for number in rng.permutation(found)]
    made = [{"segmentation": plane} for plane in planes]
    monkeypatch.setattr(source._generator, "generate_batch", lambda images: [made for _ in images])
    (masks,) = source(FRAMES[:1])
    expected = sorted(planes, key=lambda plane: -plane.sum())[:64]
    assert masks.shape == (64, 40, 64)
    assert np.array_equal(masks[: len(expected)].numpy(), np.reshape(expected, (-1, 40, 64)))
    assert not masks[len(expected) :].any()


def test_a_network_that_is_sure_of_nothing_gives_empty_masks(checkpoint: Path) -> None:
    assert not SegmentAnything(checkpoint, "small", device="cpu", pred_iou_thresh=1e9)(FRAMES[:1]).any()


def test_the_whole_command_twice(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    for name in ("a", "b"):
        (clips / name).mkdir(parents=True)
        for t, frame in enumerate(FRAMES if name == "a" else FRAMES.flip(-1)):
            Image.fromarray((frame * 255).byte().permute(1, 2, 0).numpy()).save(clips / name / f"{t}.png")
    command = ["vsrplug", "masks", "source=segment_anything", f"checkpoint={checkpoint}", "source.model=small"]
    command += [f"source.{key}={value}" for key, value in EVERYTHING.items()]
    command += ["data=folder", f"data.root={clips}", "degradation=none", "device=cpu"]

    def run(out: Path) -> dict[str, tuple[bytes, int]]:
        monkeypatch.setattr("sys.argv", [*command, f"out={out}"])
        main()
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out.iterdir())}

    first = run(tmp_path / "one")
    assert list(first) == ["a.masks", "b.masks"]
    assert "masks of 6 frames, 2 clips, in " in capsys.readouterr().out
    again = run(tmp_path / "two")
    assert {name: content for name, (content, _) in first.items()} == {
        name: content for name, (content, _) in again.items()
    }

    def refuse(*_: object) -> None:
        raise AssertionError("there was nothing to do")

    monkeypatch.setattr("vsrplug.masks._generator.BatchedGenerator.__init__", refuse)
    assert run(tmp_path / "one") == first
    assert "masks of 0 frames, 0 clips, in " in (line := capsys.readouterr().out)
    assert "2 clips were there already" in line
    header = CacheFile(tmp_path / "one" / "a.masks").header
    assert header.settings["model"] == "small"
    assert len(header.settings["sha256"]) == 64
    seen = torch.from_numpy(np.stack([np.asarray(Image.open(clips / "a" / f"{t}.png")) for t in range(3)]))
    lr = seen.permute(0, 3, 1, 2).float() / 255
    monkeypatch.undo()
    monkeypatch.setitem(segment_anything.sam_model_registry, "small", small_sam)
    expected = SegmentAnything(checkpoint, "small", device="cpu", **EVERYTHING)(lr)
    assert torch.equal(CachedMasks(tmp_path / "one")(lr), expected)


@pytest.mark.parametrize("name", ["sam_vit_h_4b8939.pth", "sam_vit_l_0b3195.pth", "my_vit_b.pth"])
def test_the_model_is_read_from_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert SegmentAnything(tmp_path / name).model in name


def test_what_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    def attempt(content: Callable[[Path], object], model: str = "small") -> str:
        path = tmp_path / "other.pth"
        content(path)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - each message is compared below
            SegmentAnything(path, model, device="cpu")(FRAMES)
        assert str(path) in str(caught.value) or "SAM model" in str(caught.value)
        return str(caught.value)

    state = torch.load(checkpoint, weights_only=True)
    assert "is damaged, or holds more than weights, and was not read (" in attempt(lambda path: path.write_bytes(b"PK"))
    assert "holds more than weights" in attempt(lambda path: torch.save(small_sam(), path))  # a pickle that names code
    assert "no checkpoint of segment-anything: its entries are weight, bias" in attempt(
        lambda path: torch.save(nn.Linear(2, 2).state_dict(), path)
    )
    assert "it holds a list" in attempt(lambda path: torch.save([1], path))
    wide = {key: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value for key, value in state.items()}
    assert "is no checkpoint of SAM's small (size mismatch for " in attempt(lambda path: torch.save(wide, path))
    del state["mask_decoder.iou_token.weight"]
    message = attempt(lambda path: torch.save(state, path))
    assert 'is no checkpoint of SAM\'s small (Missing key(s) in state_dict: "mask_decoder.iou_token.weight"' in message
    assert "give its model: source.model=..., one of default, vit_h, vit_l, vit_b, small" in message
    assert "there is no SAM model 'smalll'" in attempt(lambda path: torch.save(state, path), "smalll")


def test_refusals(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*sam\.pth; .* sam_vit_h_4b8939\.pth"):
        SegmentAnything(tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"small\.pth does not say which SAM it is; give model=vit_h"):
        SegmentAnything(checkpoint)
    with pytest.raises(ValueError, match="1 to 64 masks, got count=65"):
        SegmentAnything(checkpoint, "small", count=65)
    with pytest.raises(ValueError, match="counts of at least 1, got 0, 64, None"):
        SegmentAnything(checkpoint, "small", points_per_side=0)
    with pytest.raises(ValueError, match=r"needs frames \(t, 3, h, w\), got \(3, 40, 64\)"):
        SegmentAnything(checkpoint, "small")(FRAMES[0])
    monkeypatch.setitem(__import__("sys").modules, "segment_anything", None)
    with pytest.raises(
        ImportError, match=r"not installed .*; pip install 'vsrplug\[masks\]', or take source=superpixels"
    ):
        SegmentAnything(checkpoint, "small", device="cpu")(FRAMES)
