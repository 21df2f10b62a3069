"""`STVUN`: more pixels and more frames at once. Kang et al., "Deep Space-Time Video Upsampling Networks", ECCV 2020
(paper 004)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.site import SiteSpec
from vsrplug.space_time import checked_times

from ..plugins._blocks import warp
from ..plugins.efst import EFST
from ._reconstruction import SCALES
from ._stvun_blocks import LEVELS, AlignedFusion, Decoder, EarlyFusion, Encoder
from .pwcnet import MULTIPLE, PWCNet, resized

Fusion = Literal["efst", "early", "pcd_tsa"]


class STVUN(nn.Module):
    """The centre frame of a window enlarged, and frames between it and the next, at any times.

    Dense blocks encode each frame at four levels; each level's frames are fused without alignment (`EFST`, its weights
    shared by the levels), and dense blocks decode the fused features to the residual of the centre frame. For a moment
    between two frames, their features are warped to it by the flow, and the same decoder takes those, with the centre's
    decoded features where it took the fused ones. For clips of any length: `SlidingWindow(STVUN())`.

    The network sees values from -1 to 1, as official weights need it; frames are converted inside.

    Sites:
        `features_1`, `features_2`, `features_3` and, of the last level, `features` (clip): all frames' features; those
            of a level are made from the refined ones of the level before.
        `fused` (frame): of the last level, given `neighbours`, its features of all frames (b, t, c, h, w).
        `intermediate` (frame): of the last level, between two frames, m_T of eq. 5, given `neighbours` and `time`. It
            is called once for every time of a pass; `t` is the centre frame, and of an auxiliary loss the last time's
            counts.

    Args:
        channels: width of the features.
        frames: length of the window, odd, 3 at least.
        scale: enlargement, 1 to 4. Only the last layer depends on it, as in the paper.
        fusion: how a level's frames become one: `"efst"`; `"early"`, its first convolution alone; or `"pcd_tsa"`,
            EDVR's alignment and attention. Table 3 of the paper compares them.
        share_decoded: between frames, decode with the decoded features D of the centre; False with the fused ones
            (table 3, "w/o D").
        times: those of a pass whose `forward` is not given any; none makes it a network for the centre frame alone.
        flow: any module `(reference, supporting) -> flow (b, 2, h, w)` in LR pixels, x then y; None makes a PWC-Net.

    Raises:
        ValueError: arguments out of range.

    Shape:
        frames: (b, t, 3, h, w) in [0, 1], t equal to `frames`, any h and w -> (b, 1 + len(times), 3, s h, s w), not
        clamped.
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (
        *((pattern.replace("^", r"^efst\."), f"fusion.{ours}") for pattern, ours in EFST.official_names),
        (r"^efst\.early_fusion\.", "fusion.early_fusion."),
        *((pattern.replace("^", r"^pwcnet\."), f"pwcnet.{ours}") for pattern, ours in PWCNet.official_names),
        (r"^encoder\.conv\.0\.", "encoder.first."),
        (r"^encoder\.block(\d)\.conv([01])\.0\.", r"encoder.blocks.\1.conv\2."),
        (r"^decoder\.block(\d)_(\d)\.conv([01])\.0\.", r"decoder.levels.\1.\2.conv\3."),
        *((rf"^decoder\.cconv{level}\.", f"decoder.merges.{level - 1}.") for level in range(1, len(LEVELS))),
        (r"^decoder\.rconv0\.0\.", "decoder.hidden."),
        (r"^decoder\.rconv1\.", "decoder.last."),
    )
    official_ignored: ClassVar[tuple[str, ...]] = tuple(rf"pwcnet\.{pattern}" for pattern in PWCNet.official_ignored)

    def __init__(
        self,
        channels: int = 64,
        frames: int = 7,
        scale: int = 4,
        fusion: Fusion = "efst",
        share_decoded: bool = True,
        times: Sequence[float] = (),
        flow: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if frames < 3 or frames % 2 == 0:
            raise ValueError(f"frames must be odd, a centre and as many on either side, and 3 at least, got {frames}")
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
        if fusion not in get_args(Fusion):
            raise ValueError(f"fusion is {fusion!r}; expected one of {', '.join(map(repr, get_args(Fusion)))}")
        self.channels = channels
        self.scale = scale
        self.window = frames
        self.centre = frames // 2
        self.multiple = 4 if fusion == "pcd_tsa" else 1
        self.share_decoded = share_decoded
        self.times = checked_times(times)
        self.sites = {
            **{site: SiteSpec(channels, "clip") for site in LEVELS},
            "fused": SiteSpec(channels, "frame"),
            "intermediate": SiteSpec(channels, "frame"),
        }
        self.encoder = Encoder(channels)
        kinds: dict[str, Callable[[], nn.Module]] = {
            "efst": partial(EFST, channels, frames, zero_init=False),
            "early": partial(EarlyFusion, channels, frames),
            "pcd_tsa": partial(AlignedFusion, channels, frames),
        }
        self.fusion = kinds[fusion]()
        self.decoder = Decoder(channels, scale)
        self.pwcnet = EnlargedPWCNet() if flow is None else flow  # the official name, whatever estimates the flow

    def forward(self, frames: Tensor, context: Context | None = None, times: Sequence[float] | None = None) -> Tensor:
        """Super-resolve the centre frame, and make frames after it.

        Args:
            frames: (b, t, 3, h, w) in [0, 1], t equal to `window`.
            context: of this pass. Afterwards `context.memo["interpolated"]` holds the frames in between at the low
                resolution, eq. 6, (b, len(times), 3, h, w): what loss M (eq. 7) compares with the true ones.
            times: where between the centre frame, 0, and the next, 1; None for those of the constructor.

        Returns:
            (b, 1 + len(times), 3, s h, s w), not clamped: the centre frame, then one frame for each time.

        Raises:
            ValueError: a number of frames other than `window`, or times that are not between the two frames.
        """
        context = Context(frames) if context is None else context
        times = self.times if times is None else checked_times(times)
        if frames.shape[1] != self.window:
            raise ValueError(
                f"this STVUN takes windows of {self.window} frames, got {frames.shape[1]}; for a clip of any length "
                "use SlidingWindow(model)"
            )
        clip = context.pad(self.multiple)
        levels = self.encoder(2 * clip - 1, context)
        fused = [self.fusion(level) for level in levels]
        fused[-1] = context.refine("fused", fused[-1], t=self.centre, neighbours=levels[-1])
        decoded = self.decoder([level[:, self.centre] for level in levels], fused)
        restored = [self._enlarge(clip[:, self.centre], decoded[-1])]
        if times:
            pair = slice(self.centre, self.centre + 2)
            flows = self._flows(clip[:, pair])
            guide = decoded if self.share_decoded else fused
            interpolated = []
            for time in times:
                between = partial(_between, flows=intermediate_flows(*flows, time))
                features = [between(level[:, pair]) for level in levels]
                features[-1] = context.refine(
                    "intermediate", features[-1], t=self.centre, neighbours=levels[-1], time=time
                )
                interpolated.append(between(clip[:, pair]))
                restored.append(self._enlarge(interpolated[-1], self.decoder(features, guide)[-1]))
            h, w = frames.shape[-2:]
            context.memo["interpolated"] = torch.stack(interpolated, dim=1)[..., :h, :w]
        h, w = (self.scale * size for size in frames.shape[-2:])
        return torch.stack(restored, dim=1)[..., :h, :w]

    def _flows(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Flow from the first of two frames (b, 2, 3, h, w) into the second, and back, each (b, 2, h, w)."""
        flow = self.pwcnet(pair.transpose(0, 1).flatten(0, 1), pair.flip(1).transpose(0, 1).flatten(0, 1))
        there, back = flow.chunk(2)
        return there, back

    def _enlarge(self, frame: Tensor, decoded: Tensor) -> Tensor:
        """Eq. 8 and 10: a frame (b, 3, h, w) enlarged, and the residual of its decoded feature added."""
        base = F.interpolate(frame, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return base + self.decoder.residual(decoded) / 2  # from the range of [-1, 1] to that of [0, 1]


class EnlargedPWCNet(PWCNet):
    """Flow as STVUN's weights have it: a PWC-Net on bilinearly enlarged frames, its quarter-size output in LR pixels.

    Enlarged by 4, a quarter of the size is that of the frames. The output counts LR pixels as it is, not 20 pixels of
    the enlarged frames as PWC-Net's own weights do; these are fine-tuned with loss M (eq. 7). It sees values from -1 to
    1, as the rest of the network.
    """

    def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
        """As `PWCNet`: (b, 3, h, w) in [0, 1] -> (b, 2, h, w) in pixels of the frames, x then y; float32 at least."""
        h, w = reference.shape[-2:]
        height, width = -(-4 * h // MULTIPLE) * MULTIPLE, -(-4 * w // MULTIPLE) * MULTIPLE
        flow = self.estimate(*(2 * resized(frame, height, width) - 1 for frame in (reference, supporting)))
        flow = F.interpolate(flow, size=(h, w), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor((4 * w / width, 4 * h / height)).view(1, 2, 1, 1)


def intermediate_flows(there: Tensor, back: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Eq. 4: flows from the moment `time` between two frames into the first and into the second.

    Args:
        there: (b, 2, h, w), from the first frame into the second.
        back: (b, 2, h, w), from the second into the first.
        time: 0 at the first frame, 1 at the second.
    """
    return time**2 * back - (1 - time) * time * there, (1 - time) ** 2 * there - time * (1 - time) * back


def _between(pair: Tensor, flows: tuple[Tensor, Tensor]) -> Tensor:
    """Eq. 5 and 6: the mean of two frames or features (b, 2, c, h, w), each warped to the moment of the flows."""
    first, second = (warp(pair[:, i], flow, padding="border") for i, flow in enumerate(flows))
    return (first + second) / 2
