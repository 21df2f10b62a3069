"""Rebuild what an official implementation computed: weights by rule, input by rule, outputs from a file.

    case = load("basicsr_edvr_m_tsa")
    case.constructor      the official class's keyword arguments
    case.state_dict()     official keys -> float32 tensors, made by the rule below, nothing stored
    case.input()          the input tensor
    case.expected         {"out": tensor, ...}; big outputs are stored in parts, see `check`
    case.check({"out": y})    worst absolute difference over every stored part

The rule: for each key in official order, N = RandomState(crc32(key)).standard_normal(shape); a bias is 0.02 N, any
other entry N * gain / sqrt(fan_in). Keys in `case.kept` hold the official constant instead (SPyNet's ImageNet mean and
std, MANA's distance table) and are not in `state_dict()`; one-element parameters are in it with their official value.
A case whose folder has no outputs.npz gives keys, shapes and input only.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent


@dataclass
class Case:
    name: str
    constructor: dict
    kept: dict
    expected: dict[str, Tensor]
    spec: dict

    def state_dict(self) -> dict[str, Tensor]:
        return {
            key: torch.from_numpy(np.asarray(self._value(key, shape), dtype=np.float32))
            for key, shape, dtype in self.spec["state_dict"]
            if key not in self.kept and dtype.startswith("float")
        }

    def _value(self, key: str, shape: list[int]):
        scalars = self.spec.get("scalars_kept", {})
        if key in scalars:
            return np.full(shape, scalars[key])
        random = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
        noise = random.standard_normal(tuple(shape)).astype(np.float32)
        if key.endswith(".bias"):
            return noise * np.float32(0.02)
        gain = next((g for part, g in self.spec["gain_overrides"].items() if part in key), self.spec["gain"])
        return noise * np.float32(gain / math.sqrt(math.prod(shape[1:])))

    def input(self) -> Tensor:
        return torch.from_numpy(np.random.RandomState(0).rand(*self.spec["input_shape"]).astype(np.float32))

    def check(self, outputs: dict[str, Tensor]) -> float:
        """Worst absolute difference between `outputs` (by official name) and everything stored for those names."""
        worst, seen = 0.0, 0
        for output in self.spec["outputs"]:
            if output["name"] not in outputs:
                continue
            ours = outputs[output["name"]].detach().float()
            if list(ours.shape) != output["shape"]:
                raise ValueError(f"{self.name}/{output['name']}: shape {list(ours.shape)}, expected {output['shape']}")
            for part in output["stored"]:
                index = eval(f"np.s_{part['slice']}", {"np": np})  # our own fixture file
                worst = max(worst, (ours[index] - self.expected[part["key"]]).abs().max().item())
                seen += 1
        if not seen:
            stored = [output["name"] for output in self.spec["outputs"]]
            raise ValueError(f"{self.name}: none of {sorted(outputs)} is stored; stored are {stored}")
        return worst


def names(with_outputs: bool = True) -> list[str]:
    found = sorted(path.parent.name for path in HERE.glob("*/fixture.json"))
    return [name for name in found if not with_outputs or (HERE / name / "outputs.npz").exists()]


def load(name: str, folder: Path = HERE) -> Case:
    spec = json.loads((folder / name / "fixture.json").read_text())
    stored = folder / name / "outputs.npz"
    expected = {k: torch.from_numpy(v) for k, v in np.load(stored).items()} if stored.exists() else {}
    return Case(name, spec["constructor"], spec.get("kept", {}), expected, spec)


def full_size(name: str) -> dict:
    """Constructor, parameter count and state_dict keys with shapes of an official network at its published size."""
    return json.loads((HERE / "full_size_state_dicts.json").read_text())[name]
