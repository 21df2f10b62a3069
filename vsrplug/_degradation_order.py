"""`Order`: one round of the degradation `Real`, and what is drawn at random for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, pi
from typing import Any, TypeVar, get_args

import torch

from vsrplug._corruption import Kernel, Mode, Noise

Walk = tuple[float, float, float]  # lowest, highest, largest step from one frame to the next
T = TypeVar("T")

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
MODES: tuple[Mode, ...] = get_args(Mode)
NOISES: tuple[Noise, ...] = get_args(Noise)
SIZES = range(7, 22, 2)  # of blur kernels, in pixels


@dataclass(frozen=True)
class Order:
    """What one round does to a clip: blur, resizing, noise and JPEG, each of random strength.

    A `Walk` (lowest, highest, step) starts anywhere in its range and moves by at most a step a frame, and never leaves
    it. The defaults are those of the first round.

    Args:
        blur: probability of a blur. Kernels are 7, 9, ... or 21 pixels wide.
        kernels: weight of each kind: isotropic and anisotropic Gaussian, isotropic and anisotropic generalised
            Gaussian, isotropic and anisotropic plateau, sinc.
        sigma: width of the kernel in pixels; anisotropic ones have a second, which walks by itself.
        angle: of anisotropic kernels, in radians.
        beta_gaussian: exponent of generalised Gaussians.
        beta_plateau: exponent of plateaus.
        omega_step: of the cut-off frequency of sinc kernels, in radians a pixel. It lies between pi / 3 and pi, of
            kernels 13 pixels wide and more between pi / 5 and pi.
        enlarge: probability that the clip's first frame becomes larger,
        shrink: and that it becomes smaller; else it keeps its size.
        factor: that sizes are multiplied by. Whether bilinear, by area or bicubic is drawn once a clip.
        gaussian: standard deviation of Gaussian noise, in grey levels.
        poisson: strength of Poisson noise; 1 is a photon for every grey level that occurs in the frame.
        gaussian_noise: probability that the noise is Gaussian; else it is Poisson.
        grey_noise: probability that the channels share their noise.
        quality: of JPEG.

    Raises:
        ValueError: numbers out of range.
    """

    blur: float = 1.0
    kernels: Sequence[float] = (0.405, 0.225, 0.108, 0.027, 0.108, 0.027, 0.1)
    sigma: Walk = (0.2, 3.0, 0.02)
    angle: Walk = (-3.1416, 3.1416, 0.31416)
    beta_gaussian: Walk = (0.5, 4.0, 0.05)
    beta_plateau: Walk = (1.0, 2.0, 0.1)
    omega_step: float = 0.0628
    enlarge: float = 0.2
    shrink: float = 0.7
    factor: Walk = (0.15, 1.5, 0.015)
    gaussian: Walk = (1.0, 30.0, 0.1)
    poisson: Walk = (0.05, 3.0, 0.005)
    gaussian_noise: float = 0.5
    grey_noise: float = 0.4
    quality: Walk = (30.0, 95.0, 3.0)

    def __post_init__(self) -> None:
        freeze(self)
        for name in ("sigma", "beta_gaussian", "beta_plateau", "factor"):
            check_walk(name, getattr(self, name), 0.01)
        for name, lowest in (("angle", -inf), ("gaussian", 0), ("poisson", 0), ("quality", 1)):
            check_walk(name, getattr(self, name), lowest)
        check_probabilities(self, "blur", "enlarge", "shrink", "gaussian_noise", "grey_noise")
        if self.enlarge + self.shrink > 1:
            raise ValueError(f"enlarge={self.enlarge} and shrink={self.shrink} are more than 1 together")
        if not self.factor[0] <= 1 <= self.factor[1]:
            raise ValueError(f"factor={self.factor} has to include 1, the size as it is")
        if self.quality[1] > 100:
            raise ValueError(f"quality={self.quality} ends at 100 at most")
        if len(self.kernels) != len(KERNELS) or min(self.kernels) < 0 or sum(self.kernels) <= 0:
            raise ValueError(f"kernels={self.kernels}: expected {len(KERNELS)} weights, of {', '.join(KERNELS)}")

    def draw(self, dice: Dice, codecs: Sequence[str], bits_per_pixel: tuple[float, float]) -> Parameters:
        """What happens to one clip, but for the noise itself."""
        kernel, size = dice.pick(KERNELS, self.kernels), dice.pick(SIZES)
        beta = self.beta_plateau if kernel.startswith("plateau") else self.beta_gaussian
        low, high, _ = self.factor
        keep = max(0.0, 1 - self.enlarge - self.shrink)
        start = dice.pick(((1.0, high), (low, 1.0), (1.0, 1.0)), (self.enlarge, self.shrink, keep))
        noise = dice.pick(NOISES, (self.gaussian_noise, 1 - self.gaussian_noise))
        return Parameters(
            kernel=kernel if dice.chance(self.blur) else None,
            size=size,
            sigma=list(zip(dice.walk(self.sigma), dice.walk(self.sigma), strict=True)),
            angle=dice.walk(self.angle),
            beta=dice.walk(beta),
            omega=dice.walk((pi / 3 if size < 13 else pi / 5, pi, self.omega_step)),
            mode=dice.pick(MODES),
            factor=dice.walk(self.factor, dice.number(*start)),
            noise=noise,
            grey=dice.chance(self.grey_noise),
            strength=dice.walk(self.gaussian if noise == "gaussian" else self.poisson),
            quality=[round(value) for value in dice.walk(self.quality)],
            codec=dice.pick(codecs),
            bits_per_pixel=dice.number(*bits_per_pixel),
        )


@dataclass(frozen=True)
class Parameters:
    """What was drawn for one round of one clip; lists have one value a frame."""

    kernel: Kernel | None
    size: int
    sigma: list[tuple[float, float]]
    angle: list[float]
    beta: list[float]
    omega: list[float]
    mode: Mode
    factor: list[float]
    noise: Noise
    grey: bool
    strength: list[float]
    quality: list[int]
    codec: str
    bits_per_pixel: float


class Dice:
    """Random choices for a clip of so many frames; each costs a fixed number of draws."""

    def __init__(self, generator: torch.Generator, frames: int, walk: bool) -> None:
        self.generator = generator
        self.frames = frames
        self.moves = walk

    def number(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def chance(self, probability: float) -> bool:
        return self.number(0, 1) < probability

    def pick(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        chances = torch.tensor(weights or [1.0] * len(options), dtype=torch.float64)
        return options[int(torch.multinomial(chances, 1, generator=self.generator))]

    def walk(self, limits: Walk, start: float | None = None) -> list[float]:
        low, high, step = limits
        values = [self.number(low, high) if start is None else start]
        for _ in range(self.frames - 1):
            move = self.number(-step, step) if self.moves else 0.0
            values.append(min(max(values[-1] + move, low), high))
        return values


def freeze(arguments: Any) -> None:
    """Lists, which a yaml has, become tuples: equal arguments are then equal."""
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if isinstance(value, list):
            object.__setattr__(arguments, field.name, tuple(value))


def check_walk(name: str, walk: Sequence[float], lowest: float) -> None:
    walk = tuple(walk)
    if len(walk) != 3 or not lowest <= walk[0] <= walk[1] or walk[2] < 0:
        raise ValueError(f"{name}={walk}: expected lowest, highest and step, of at least {lowest:g} and 0")


def check_probabilities(arguments: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"{name}={getattr(arguments, name)} is a probability, between 0 and 1")


FIRST = Order()
SECOND = Order(
    blur=0.8,
    sigma=(0.2, 1.5, 0.02),
    enlarge=0.3,
    shrink=0.4,
    factor=(0.3, 1.2, 0.03),
    gaussian=(1.0, 25.0, 0.1),
    poisson=(0.05, 2.5, 0.005),
)
