"""A short adversarial run on so many devices, started by test_adversarial: `python two_adversaries.py DEVICES OUT`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from test_module import data, trainer

from vsrplug import attach
from vsrplug.adversarial import AdversarialModule
from vsrplug.backbones import RealBasicVSR, SPyNet
from vsrplug.discriminator import UNetDiscriminator
from vsrplug.losses import l1
from vsrplug.tuning import Staged

ALONE = {"pixel": 1.0, "backbone/cleaning": 1.0}

if __name__ == "__main__":
    devices, out = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(1)
    backbone = RealBasicVSR(8, 1, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), reconstruction_channels=4)
    module = AdversarialModule(
        attach(backbone),
        Staged({"alone": {"steps": 2, "losses": ALONE}, "both": {"steps": 2}, "end": {"losses": ALONE}}),
        discriminator=UNetDiscriminator(4),
        discriminator_lr=0.2,
        # SGD: Adam divides by the gradient, so where that is next to nothing it turns rounding into whole steps.
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        pixel=l1,
        losses={**ALONE, "adversarial": 0.05},
    )
    strategy = {"strategy": "ddp", "devices": devices} if devices > 1 else {"devices": 1}
    running = trainer(6, use_distributed_sampler=False, **strategy)
    running.fit(module, data(masks=None, batch_size=4 // devices))
    found = {name: parameter.tolist() for name, parameter in module.named_parameters()}
    out.with_name(f"{out.name}.{running.global_rank}").write_text(json.dumps(found))
