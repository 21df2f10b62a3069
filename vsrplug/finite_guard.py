"""`FiniteGuard`: a training run stopped at the first NaN or Inf, before it reaches a weight."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from vsrplug.plugin_files import write_safetensors


class FiniteGuard(Callback):
    """Stops training at the first NaN or Inf in input, loss or gradient, before it reaches a weight.

    The error names the step, which of the three it was, the clips, and the two files it left beside the other
    checkpoints: `last_finite.ckpt`, the whole state before that step, from which a run can be resumed (the same samples
    come again, so what was wrong with them has to be mended first), and `not_finite.safetensors`, the batch, with the
    clips' names in its metadata.

    Reading a number from a GPU waits for all that was asked of it. One number is read an optimizer step, after the
    backward pass and before the weights move: every step, because one step later the good weights are gone; and no more
    than one, however many inputs, losses and accumulated batches it sums up. Devices agree on it, so that all stop. On
    a CPU, where reading is free, the input is looked at before the network sees it: there, torchvision's deformable
    convolution ends the process at an offset of NaN.

    With float16 (`precision=16-mixed`) gradients overflow as a matter of course, and the loss scaler leaves such steps
    out. They are looked at only once its scale has fallen below 1, where it is no longer the scaling that is too much.

    Raises:
        ValueError: while training, NaN or Inf.
    """

    def __init__(self) -> None:
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the batch, of which an optimizer step may have several."""
        self._batches.append(batch)
        self._seen.append(_norm(_clips(batch).values()))
        if pl_module.device.type == "cpu":
            self._look(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note its loss."""
        self._losses.append(loss.detach())
        self._seen.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at what was noted, and at the gradients, while the weights are still good."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None or scaler.get_scale() < 1:
            self._seen.append(_norm(p.grad for group in optimizer.param_groups for p in group["params"]))
        self._look(trainer, pl_module)
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the batches."""
        self._forget()

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read, all devices together, whether what was seen since the last look is finite."""
        wrong = torch.stack([~value.isfinite().to(pl_module.device) for value in self._seen]).any().float()
        self._seen.clear()
        if trainer.strategy.reduce(wrong, reduce_op="sum"):
            self._stop(trainer, pl_module)

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other devices on what it was, save, and raise; if it was nothing but a large norm, go on."""
        cause, blamed = self._cause(pl_module)
        causes: list[_Cause | None] = [cause]
        if trainer.world_size > 1:
            causes = [None] * trainer.world_size
            torch.distributed.all_gather_object(causes, cause)
        # The earliest: a bad input makes the loss bad, and that the gradients of all devices.
        order = min((found.order for found in causes if found), default=None)
        if order is None:
            return
        known = {rank: found for rank, found in enumerate(causes) if found and found.order == order}
        clips = list(dict.fromkeys(clip for found in known.values() for clip in found.clips))
        first = next(iter(known))
        folder = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir)
        saved = _save(trainer, folder, self._batches[blamed] if trainer.global_rank == first else None)
        raise ValueError(
            f"step {trainer.global_step}: NaN or Inf in the {known[first].where}, clip{'s' * (len(clips) > 1)} "
            f"{', '.join(clips)}; {saved}. {_ADVICE[order]}"
        )

    def _cause(self, pl_module: LightningModule) -> tuple[_Cause | None, int]:
        """What was wrong on this device, if anything, and with which of the step's batches."""
        for index, batch in enumerate(self._batches):
            bad: defaultdict[str, list[str]] = defaultdict(list)
            for key, clips in _clips(batch).items():
                for name, clip in zip(_names(batch), clips, strict=True):
                    if not clip.isfinite().all():
                        bad[name].append(key)
            if bad:  # a clip may be there twice
                told = [f"{name} ({', '.join(dict.fromkeys(keys))})" for name, keys in bad.items()]
                return _Cause(0, "input", told), index
        for index, loss in enumerate(self._losses):
            if not loss.isfinite():
                return _Cause(1, f"loss ({loss.item():g})", _names(self._batches[index])), index
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        wrong = [name.removeprefix("model.") for name, grad in gradients.items() if not grad.isfinite().all()]
        if not wrong:
            return None, 0
        shown = ", ".join(wrong[:3]) + ", ..." * (len(wrong) > 3)
        names = [name for batch in self._batches for name in _names(batch)]
        return _Cause(2, f"gradient of {len(wrong)} of {len(gradients)} parameters ({shown})", names), 0

    def _forget(self) -> None:
        """What belongs to one optimizer step."""
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []
        self._seen: list[Tensor] = []  # losses, and norms of inputs and gradients


_MAYBE = "A lower rate, or trainer.gradient_clip_val, may help"
_ADVICE = ("Mend that clip or leave it out", _MAYBE, _MAYBE)


class _Cause(NamedTuple):
    order: int  # 0 input, 1 loss, 2 gradient
    where: str
    clips: list[str]


def _clips(batch: Any) -> dict[str, Tensor]:
    """What of a batch can be NaN, by its key."""
    entries = batch.items() if isinstance(batch, Mapping) else ()
    return {key: value for key, value in entries if isinstance(value, Tensor) and value.is_floating_point()}


def _names(batch: Any) -> list[str]:
    """The clips' names, or, where a batch has none, their numbers in it."""
    if isinstance(batch, Mapping) and "name" in batch:
        return [repr(name) for name in batch["name"]]
    return [f"number {i}" for i in range(max((len(clips) for clips in _clips(batch).values()), default=0))]


def _norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """The norm of all values: not finite where one of them is not, or where it overflows itself. The cheapest such."""
    return get_total_norm([tensor for tensor in tensors if tensor is not None])


def _save(trainer: Trainer, folder: Path, batch: Any) -> str:
    """Write the state, and the batch on the device that has it; returns where to, for the error."""
    state, inputs = folder / "last_finite.ckpt", folder / "not_finite.safetensors"
    try:
        if isinstance(batch, Mapping):
            tensors = {key: value.cpu().contiguous() for key, value in batch.items() if isinstance(value, Tensor)}
            names = json.dumps(list(map(str, batch.get("name", ()))))
            write_safetensors(tensors, inputs, {"name": names, "step": str(trainer.global_step)})
        trainer.save_checkpoint(state)
    except OSError as error:
        trainer.strategy.barrier()  # where the other devices wait, inside save_checkpoint
        return f"the state before it could not be saved ({error})"
    return f"the state before that step is in {state}, the batch in {inputs}"
