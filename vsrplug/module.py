"""`VSRModule`: trains a plugged model, or the part of it that a tuning names, under Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vsrplug.context import Context, Flows
from vsrplug.evaluation import restore, score
from vsrplug.losses import charbonnier, end_point_error
from vsrplug.plugged import PluggedModel
from vsrplug.protocols import Protocol
from vsrplug.site import unknown_name
from vsrplug.tuning import Tuning

Batch = dict[str, Any]


class VSRModule(LightningModule):
    """Trains what `tuning` names of a model; owns losses and the optimizer, while the network stays plain torch.

    Args:
        model: what `attach` returned; a plain backbone is `attach(backbone)`.
        tuning: which parameters learn, and at what rate.
        optimizer: `functools.partial` of an optimizer, finished with the trainable parameters only. Its `lr` is the
            rate of groups without a factor.
        schedule: partial of a learning rate schedule, stepped every optimizer step, or None.
        losses: weight by name. `pixel` is `pixel(sr, hr)`; `flow` is the end-point error of the backbone's flows, in LR
            pixels, where the data know the true flow; any other is a pattern over the plug-ins' auxiliary losses,
            `"<attach name>/<loss>"`.
        pixel: the loss between restored and true frames.
        validation: how a restored validation clip is scored, or None.
        seed: every training step seeds torch's generator from it and the step, so that a resumed run draws the noise
            an undisturbed one would.

    Batches:
        `lr` (b, t, 3, h, w) and `hr` (b, t, 3, s h, s w) in [0, 1]; where present `masks` (b, t, m, h, w),
        `flow_backward` and `flow_forward` (b, t-1, 2, h, w) in LR pixels. A window network is trained on the window in
        their middle, so that one setting of the data serves a comparison of all networks.
    """

    def __init__(
        self,
        model: PluggedModel,
        tuning: Tuning,
        *,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        losses: Mapping[str, float] | None = None,
        pixel: Callable[[Tensor, Tensor], Tensor] = charbonnier,
        validation: Protocol | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # On the CPU, weights laid out otherwise than the features slow a bfloat16 training step about twofold. Only
        # convolutions are: DDP cannot broadcast a lone buffer that is channels-last.
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        self.model = model
        self.tuning = tuning
        self.optimizer = optimizer
        self.schedule = schedule
        self.losses = dict(losses or {"pixel": 1.0})
        self.pixel = pixel
        self.validation = validation
        self.seed = seed
        self.trainable = tuning.apply(model)

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        """(b, t, 3, h, w) in [0, 1] -> (b, t_out, 3, s h, s w)."""
        return self.model(frames, context)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed what plug-ins draw in this step."""
        torch.manual_seed(hash((self.seed, self.global_step, batch_idx, self.global_rank)) & 0xFFFFFFFF)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses; each is logged under its name.

        Raises:
            ValueError: a loss is named that this model or this data does not have.
        """
        window = getattr(self.model.backbone, "window", None)
        lr, hr, masks = (_middle(batch.get(key), window) for key in ("lr", "hr", "masks"))
        context = Context(lr, masks=masks, target=hr)
        sr = self.model(lr, context)
        if window:  # such a network restores the centre frame only
            hr = hr[:, [window // 2]]
        values = {"pixel": self.pixel(sr.float(), hr)}
        if "flow_backward" in batch and context.flows is not None:
            values["flow"] = end_point_error(context.flows, Flows(batch["flow_backward"], batch["flow_forward"]))
        values |= context.losses
        total = torch.zeros((), device=sr.device)
        for pattern, weight in self.losses.items():
            named = {name: value for name, value in values.items() if fnmatchcase(name, pattern)}
            if not named:
                raise ValueError("losses: " + unknown_name("loss that matches", pattern, values))
            total = total + weight * sum(named.values())
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, prog_bar=True)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:
        """PSNR and SSIM of one whole clip, under the validation protocol's definitions; returns `{"sr": ...}`."""
        if self.validation is None:
            return None
        masks = None if batch.get("masks") is None else batch["masks"][0]
        sr = restore(clip_network(self.model), batch["lr"][0], masks, mirror=self.validation.mirror)[None]
        scores = score(sr[0], batch["hr"][0], self.validation)
        # One clip a batch, so the mean over batches is the protocol's mean over clips.
        named = {f"val/{self.validation.name}/{metric}": value for metric, value in scores.items()}
        self.log_dict(named, prog_bar=True, batch_size=1, sync_dist=True)
        return {"sr": sr}

    def configure_optimizers(self) -> Any:
        """The optimizer over trainable parameters alone, in groups by rate, and its schedule."""
        make: Any = self.optimizer or torch.optim.Adam
        lr = getattr(make, "keywords", {}).get("lr", 1e-3)
        optimizer = make(self.tuning.groups(self.model, lr))
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def _middle(clip: Any, frames: int | None) -> Any:
    """The `frames` frames in the middle of (b, t, ...), or all."""
    if clip is None or frames is None:
        return clip
    start = max(0, clip.shape[1] - frames) // 2
    return clip[:, start : start + frames]


def clip_network(model: nn.Module) -> nn.Module:
    """The model itself, or, for a window network, a `SlidingWindow` around it: clip in, clip out."""
    if not getattr(getattr(model, "backbone", model), "window", None):
        return model
    from vsrplug.backbones import SlidingWindow  # only window networks need it

    return SlidingWindow(model)
