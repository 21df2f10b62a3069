"""A short staged run on so many devices, started by test_phases: `python two_processes.py DEVICES OUT`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from test_module import data, trainer

from vsrplug import VSRModule, attach
from vsrplug.backbones import BasicVSR, SPyNet
from vsrplug.plugins import MemoryBankPlugin
from vsrplug.tuning import Staged

PHASES = {
    "bank": {"steps": 2, "train": ["plugins.bank.*"]},
    "memory": {"steps": 2, "train": ["plugins.bank.*"], "freeze": ["*.output.*"], "losses": {"bank/quantisation": 1.0}},
    "all": {"steps": 2, "freeze": ["flow"]},
    "flow": {"lr": 0.05},
}

if __name__ == "__main__":
    devices, out = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(1)
    backbone = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), reconstruction_channels=4)
    model = attach(backbone, bank=partial(MemoryBankPlugin, groups=4, entries=4))
    # SGD: Adam divides by the gradient, so where that is next to nothing it turns rounding into whole steps.
    module = VSRModule(model, Staged(PHASES), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    strategy = {"strategy": "ddp", "devices": devices} if devices > 1 else {"devices": 1}
    running = trainer(8, use_distributed_sampler=False, **strategy)
    running.fit(module, data(masks=None, batch_size=4 // devices))
    found = {name: parameter.tolist() for name, parameter in model.named_parameters()}
    out.with_name(f"{out.name}.{running.global_rank}").write_text(json.dumps(found))
