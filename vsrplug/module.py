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
from vsrplug.phases import (
    Schedule,
    Timeline,
    buffers,
    keep_state,
    make_schedule,
    not_reached,
    restore_buffers,
    unreached,
    wrap_again,
)
from vsrplug.plugged import PluggedModel
from vsrplug.protocols import Protocol
from vsrplug.site import unknown_name
from vsrplug.space_time import interpolates, times_between
from vsrplug.tuning import Staged, Tuning

Batch = dict[str, Any]

IN_BETWEEN = ("between", "interpolated")  # losses on frames in between


class VSRModule(LightningModule):
    """Trains what `tuning` names of a model; owns losses and the optimizer, while the network stays plain torch.

    Args:
        model: what `attach` returned; a plain backbone is `attach(backbone)`.
        tuning: which parameters learn, when, and at what rate. Between the phases of a `Staged` one the optimizer is
            made anew; a run may be killed and resumed in any of them and at their edges.
        optimizer: `functools.partial` of an optimizer, finished with the trainable parameters only. Its `lr` is the
            rate of groups without a factor.
        schedule: partial of a learning rate schedule, stepped every optimizer step, or None. In a `Staged` tuning its
            `T_max` or `total_steps`, where given, becomes the number of steps from one fresh start to the next.
        losses: weight by name. `pixel` is `pixel(sr, hr)`; `flow` is the end-point error of the backbone's flows, in LR
            pixels, where the data know the true flow. Where the data have frames in between and the network makes them,
            `between` is the sum over them of `pixel(sr, hr)`, and `interpolated` that of the low-resolution ones in the
            pass's `memo["interpolated"]` (STVUN's losses F and M, eq. 11 and 7; `pixel` is S, eq. 9); while neither is
            named, they are not made. Any other is a pattern over the plug-ins' auxiliary losses,
            `"<attach name>/<loss>"`.
        pixel: the loss between restored and true frames.
        target: what to teach in the place of `hr`, made of it, (b, t, 3, s h, s w) -> the same; or None.
        validation: how a restored validation clip is scored, or None.
        seed: every training step seeds torch's generator from it and the step, so that a resumed run draws the noise
            an undisturbed one would.

    Attributes:
        trainable: scalars that learn, in one phase or another.

    Raises:
        ValueError: the tuning does not fit the model; while training, a phase trains what its losses do not reach.

    Batches:
        `lr` (b, t, 3, h, w) and `hr` (b, t, 3, s h, s w) in [0, 1]; where present `masks` (b, t, m, h, w),
        `flow_backward` and `flow_forward` (b, t-1, 2, h, w) in LR pixels, `lr_between` and `hr_between`, the frames
        that lie between the middle one and the next, evenly spaced. A window network is trained on the window in
        their middle, so that one setting of the data serves a comparison of all networks.
    """

    def __init__(
        self,
        model: PluggedModel,
        tuning: Tuning | Staged,
        *,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
        schedule: Schedule | None = None,
        losses: Mapping[str, float] | None = None,
        pixel: Callable[[Tensor, Tensor], Tensor] = charbonnier,
        target: Callable[[Tensor], Tensor] | None = None,
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
        self.target = target
        self.validation = validation
        self.seed = seed
        self.timeline = Timeline(tuning.phases)
        self.phase = 0  # whose parameters learn, with whose optimizer
        tuning.apply(model)
        self.trainable = sum(model.get_parameter(name).numel() for name in tuning.trained(model))

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        """(b, t, 3, h, w) in [0, 1] -> (b, t_out, 3, s h, s w)."""
        return self.model(frames, context)

    def train(self, mode: bool = True) -> VSRModule:
        """Train or eval mode; normalisation layers whose statistics are frozen stay in eval mode."""
        super().train(mode)
        for layer in self.timeline.phases[self.phase].frozen_statistics(self.model):
            layer.eval()
        return self

    def on_fit_start(self) -> None:
        """Compare the phases with the trainer's steps."""
        self.timeline.check(self.trainer.max_steps)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Enter the phase of this step, and seed what plug-ins draw in it."""
        if self.global_step == 0 and batch_idx == 0:
            self._check_reach(batch)
        if self.timeline.at(self.global_step) != self.phase:
            self._enter(self.timeline.at(self.global_step))
        torch.manual_seed(hash((self.seed, self.global_step, batch_idx, self.global_rank)) & 0xFFFFFFFF)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the phase, which the step alone does not tell: at an edge, the optimizer saved is the last phase's."""
        checkpoint["phase"] = self.phase

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the phase before the optimizer is made whose state the checkpoint has.

        Raises:
            ValueError: the checkpoint is of a run with more phases.
        """
        phase = checkpoint.get("phase", 0)
        if phase >= len(self.timeline.phases):
            raise ValueError(
                f"the checkpoint is of phase {phase + 1} of a tuning, this one has {len(self.timeline.phases)}; give "
                "the tuning it was made with, or another hydra.run.dir"
            )
        self._set(phase)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the phase's losses; each is logged under its name.

        Raises:
            ValueError: a loss is named that this model or this data does not have.
        """
        total, values = self._loss(batch, self._weights(self.phase))
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, prog_bar=True)
        return total

    def _weights(self, phase: int) -> Mapping[str, float]:
        own = self.timeline.phases[phase].losses
        return self.losses if own is None else own

    def _loss(self, batch: Batch, weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every loss there is by its name."""
        window = getattr(self.model.backbone, "window", None)
        lr, hr, masks = (_middle(batch.get(key), window) for key in ("lr", "hr", "masks"))
        plain, hr = hr, hr if self.target is None else self.target(hr)
        context = Context(lr, masks=masks, target=hr)
        times = self._times(batch, weights)
        sr = self.model(lr, context, **({} if times is None else {"times": times}))
        if window:  # such a network restores the centre frame only
            plain, hr = plain[:, [window // 2]], hr[:, [window // 2]]
        true = hr if not times else torch.cat([hr, batch["hr_between"]], dim=1)
        if sr.shape != true.shape:
            raise ValueError(
                f"the model returned {tuple(sr.shape)} for frames {tuple(lr.shape)}, the ground truth is "
                f"{tuple(true.shape)}; has the degradation the model's scale?"
            )
        sr, between = sr.float().split([hr.shape[1], len(times or ())], dim=1)
        values = {"pixel": self.pixel(sr, hr)}
        if times:
            low = context.memo["interpolated"]
            values["between"] = len(times) * self.pixel(between, batch["hr_between"])
            values["interpolated"] = len(times) * self.pixel(low.float(), batch["lr_between"])
        if "flow_backward" in batch and context.flows is not None:
            values["flow"] = end_point_error(context.flows, Flows(batch["flow_backward"], batch["flow_forward"]))
        values |= context.losses | self._further(sr, hr, plain, weights)
        total = torch.zeros((), device=sr.device)
        for pattern, weight in weights.items():
            named = {name: value for name, value in values.items() if fnmatchcase(name, pattern)}
            if not named:
                raise ValueError("losses: " + unknown_name("loss that matches", pattern, values))
            total = total + weight * sum(named.values())
        return total, values

    def _times(self, batch: Batch, weights: Mapping[str, float]) -> tuple[float, ...] | None:
        """The times at which the network is to make frames in between; None where it cannot."""
        if not interpolates(self.model) or not getattr(self.model.backbone, "window", None):
            return None
        wanted = any(fnmatchcase(name, pattern) for name in IN_BETWEEN for pattern in weights)
        return times_between(batch["hr_between"].shape[1]) if wanted and "hr_between" in batch else ()

    def _further(self, sr: Tensor, hr: Tensor, plain: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Losses that a subclass adds, between what was restored, what is taught (`hr`) and the truth (`plain`)."""
        return {}

    def _check_reach(self, batch: Batch) -> None:
        """One trial pass for each phase, before the first step: a mistake must not wait for step 120,000."""
        saved = buffers(self)
        for index, (name, phase) in enumerate(self.tuning.phases.items()):
            self._set(index)
            torch.manual_seed(self.seed)
            with self.trainer.precision_plugin.train_step_context():
                loss, _ = self._loss(batch, self._weights(index))
            lost = unreached(self.model, sorted(phase.trained(self.model)), loss)
            restore_buffers(self, saved)
            if lost:
                raise ValueError(not_reached(name, list(self._weights(index)), lost))
        self._set(0)

    def _set(self, phase: int) -> None:
        """Let the phase's parameters and running statistics learn, and no others."""
        frozen = self.timeline.phases[self.phase].frozen_statistics(self.model)
        self.phase = phase
        self.timeline.phases[phase].apply(self.model)
        still = self.timeline.phases[phase].frozen_statistics(self.model)
        for layer in frozen:
            if layer not in still:
                layer.train(self.training)

    def _enter(self, phase: int) -> None:
        """Go over to another phase, with an optimizer over its parameters alone."""
        (old,) = self.trainer.optimizers
        self._set(phase)
        self.model.zero_grad()  # of what is frozen now
        self.trainer.strategy.setup_optimizers(self.trainer)  # calls configure_optimizers
        if self.timeline.fresh(phase) != phase:
            keep_state(old, self.trainer.optimizers[0])
        wrap_again(self.trainer)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:
        """PSNR and SSIM of one whole clip, under the validation protocol's definitions; returns `{"sr": ...}`."""
        if self.validation is None:
            return None
        masks = None if batch.get("masks") is None else batch["masks"][0]
        mirror, between = self.validation.mirror, self.validation.between
        sr = restore(clip_network(self.model), batch["lr"][0], masks, mirror=mirror, between=between)[None]
        scores = score(sr[0], batch["hr"][0], self.validation)
        # One clip a batch, so the mean over batches is the protocol's mean over clips.
        named = {f"val/{self.validation.name}/{metric}": value for metric, value in scores.items()}
        self.log_dict(named, prog_bar=True, batch_size=1, sync_dist=True)
        return {"sr": sr}

    def configure_optimizers(self) -> Any:
        """The optimizer over what learns in this phase, in groups by rate and weight decay, and its schedule."""
        make: Any = self.optimizer or torch.optim.Adam
        fresh = self.timeline.fresh(self.phase)
        lr = self.timeline.phases[fresh].lr or getattr(make, "keywords", {}).get("lr", 1e-3)
        optimizer = make(self._groups(lr))
        if self.schedule is None:
            return optimizer
        length = self.timeline.length(self.phase, self.trainer.max_steps) if len(self.timeline.phases) > 1 else None
        done = self.timeline.starts[self.phase] - self.timeline.starts[fresh]
        schedule = make_schedule(self.schedule, optimizer, length, done)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self, lr: float) -> list[dict[str, Any]]:
        """What the optimizer is made over."""
        return self.timeline.phases[self.phase].groups(self.model, lr)


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
