from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from vsrplug.plugins import _deformable
from vsrplug.plugins._deformable import DeformablePack, deformable_convolution


def _case(b: int, c: int, o: int, groups: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, offset, mask, weight, bias; the offsets lead well beyond the border."""
    shapes = [(b, c, h, w), (b, 18 * groups, h, w), (b, 9 * groups, h, w), (o, c, 3, 3), (o,)]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    values[1] *= 3
    values[2] = values[2].sigmoid()
    return [value.to(dtype).requires_grad_() for value in values]


def _oracle(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


@pytest.mark.parametrize(
    "size", [(1, 4, 4, 1, 5, 6), (2, 8, 6, 4, 7, 3), (2, 6, 3, 2, 1, 1), (1, 16, 16, 16, 9, 1)], ids=str
)
@pytest.mark.parametrize("samples", [1, 2**22], ids=["row by row", "at once"])
def test_values_and_gradients_are_those_of_torchvision(
    size: tuple[int, ...], samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_deformable, "CPU_SAMPLES", samples)
    given = _case(*size)
    ours, theirs = deformable_convolution(*given), _oracle(*given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    weighting = torch.randn_like(theirs)
    gradients = [torch.autograd.grad((result * weighting).sum(), given) for result in (ours, theirs)]
    for mine, official in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, official, rtol=0, atol=1e-10)


def test_without_bias() -> None:
    x, offset, mask, weight, _ = _case(1, 4, 5, 2, 4, 4)
    ours, theirs = deformable_convolution(x, offset, mask, weight), _oracle(x, offset, mask, weight, None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(deformable_convolution, _case(1, 2, 2, 1, 3, 3))


def test_no_offset_and_full_mask_is_a_plain_convolution() -> None:
    x, offset, mask, weight, bias = _case(2, 8, 4, 2, 6, 5)
    ours = deformable_convolution(x, torch.zeros_like(offset), torch.ones_like(mask), weight, bias)
    torch.testing.assert_close(ours, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=1e-12)


def test_bfloat16_samples_at_exact_positions() -> None:
    # Beyond 256 pixels bfloat16 counts in twos: a position in bfloat16 would miss by a pixel and more.
    x, offset, mask, weight, bias = (value.detach() for value in _case(1, 4, 4, 2, 3, 500, torch.bfloat16))
    x = torch.linspace(0, 1, 500).bfloat16().expand_as(x)
    ours = deformable_convolution(x, offset, mask, weight, bias)
    assert ours.dtype == torch.bfloat16
    exact = _oracle(*(value.double() for value in (x, offset, mask, weight, bias)))
    torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=0.03)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    x, offset, mask, weight, bias = _case(1, 4, 4, 2, 5, 6)
    with pytest.raises(ValueError, match=r"offset must be \(b, 18 g, h, w\).*got \(1, 18, 5, 6\), \(1, 18, 5, 6\)"):
        deformable_convolution(x, offset[:, :18], mask, weight, bias)
    with pytest.raises(ValueError, match=r"g divides c.*\(4, 3, 3, 3\)"):
        deformable_convolution(x, offset, mask, weight[:, :3], bias)


def test_pack_starts_as_half_a_convolution_and_has_the_official_keys() -> None:
    pack = DeformablePack(8, 6, groups=4)
    assert list(pack.state_dict()) == ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    x, feature = torch.rand(2, 8, 5, 7), torch.rand(2, 8, 5, 7)
    torch.testing.assert_close(pack(x, feature), F.conv2d(x, pack.weight, padding=1) / 2 + pack.bias[:, None, None])


def test_pack_reads_the_prediction_in_thirds() -> None:
    pack = DeformablePack(8, 6, groups=4)
    torch.nn.init.normal_(pack.conv_offset.weight, std=0.2)
    x, feature = torch.rand(2, 8, 5, 7), torch.rand(2, 8, 5, 7)
    first, second, third = pack.conv_offset(feature).chunk(3, dim=1)
    official = _oracle(x, torch.cat((first, second), dim=1), third.sigmoid(), pack.weight, pack.bias)
    torch.testing.assert_close(pack(x, feature), official, rtol=0, atol=1e-5)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="8 deformable groups do not divide 12 channels; try 4"):
        DeformablePack(12, 12, groups=8)
