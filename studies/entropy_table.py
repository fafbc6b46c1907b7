"""Every entropy estimator against what it estimates, on laws where that is known.

    python studies/entropy_table.py --draws 20

prints one row an estimator, law, d and B, and writes the same as CSV: the mean over draws, the
truth, the bias (mean - truth), the standard deviation over draws, and the milliseconds of one value
with its gradient. All in nats, float32, every estimator at its defaults. The column ``target`` says
what the truth is, since not every estimator is one of differential entropy:

- ``entropy``: the law's differential entropy (on the sphere: per surface measure);
- ``direction``: that of z / |z|, by Monte Carlo over its density (the vMF kernel sees no length);
- ``moment``: the entropy of the Gaussian with the law's covariance (the law is no Gaussian);
- ``surface``: k-NN on a sphere, where its first-order value depends on B: the law's surface
  entropy, carried through the estimator's formula for d dimensions;
- ``rate``: the coding rate of the law's second moment;
- ``kernel``: -log(1/B + (1 - 1/B) E k(z, z')^2), Renyi's order 2 at this B.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iecl_solo.entropy import ESTIMATORS, estimate, log_vmf_normalizer

DIMENSIONS = (2, 16, 128)
BATCHES = (32, 256, 2048)
ANGLES = np.linspace(0, math.pi, 40001)


def default(estimator: str, option: str) -> Any:
    return inspect.signature(ESTIMATORS[estimator]).parameters[option].default


EPS: float = default("coding_rate", "eps")
NEIGHBORS: int = default("knn", "num_neighbors")
BANDWIDTH_SQUARED: float = default("renyi", "bandwidth") ** 2


@dataclass(frozen=True)
class Row:
    estimator: str
    law: str
    d: int
    B: int
    value: float
    truth: float
    target: str
    bias: float
    std: float
    ms: float


def log_area(d: int) -> float:
    return -log_vmf_normalizer(d, 0.0).item()


def log_ball(d: int) -> float:
    return d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)


def gaussian_entropy_of(variances: np.ndarray) -> float:
    return 0.5 * float(np.log(2 * math.pi * math.e * variances).sum())


def coding_rate_of(second_moments: np.ndarray) -> float:
    return 0.5 * float(np.log1p(len(second_moments) / EPS**2 * second_moments).sum())


def kernel_entropy_of(mean_square: float, batch: int) -> float:
    return -math.log(1 / batch + (1 - 1 / batch) * mean_square)


def knn_on_a_sphere(surface_entropy: float, d: int, batch: int) -> float:
    """Where d/B sum log r settles, when it is the (d - 1)-dimensional formula that holds."""
    counts = torch.tensor([float(batch), float(NEIGHBORS)]).double().digamma()
    digammas = (counts[0] - counts[1]).item()
    mean_log_distance = (surface_entropy - digammas - log_ball(d - 1)) / (d - 1)
    return digammas + log_ball(d) + d * mean_log_distance


class Law(ABC):
    """A law on R^d: how to draw from it, and (truth, target) for each estimator."""

    name: str

    def __init__(self, d: int) -> None:
        self.d = d

    @abstractmethod
    def sample(self, batch: int, generator: np.random.Generator) -> np.ndarray: ...

    @abstractmethod
    def truth(self, estimator: str, batch: int) -> tuple[float, str]: ...


class Gaussian(Law):
    """Centred, the largest variance 4 times the smallest (geometric), trace 1 as of unit rows."""

    name = "gaussian"
    ratio = 4.0

    def __init__(self, d: int) -> None:
        super().__init__(d)
        variances = np.geomspace(1, 1 / self.ratio, d)
        self.variances = variances / variances.sum()

    def sample(self, batch: int, generator: np.random.Generator) -> np.ndarray:
        return generator.standard_normal((batch, self.d)) * np.sqrt(self.variances)

    def direction_entropy(self, draws: int = 100_000) -> float:
        # the angular central Gaussian density, per surface measure (Tyler 1987)
        total, generator = 0.0, np.random.default_rng(0)
        for _ in range(10):
            z = self.sample(draws // 10, generator)
            u = z / np.linalg.norm(z, axis=1, keepdims=True)
            quadratic = (u**2 / self.variances).sum(1)
            log_density = -0.5 * np.log(self.variances).sum() - self.d / 2 * np.log(quadratic)
            total -= log_density.mean() / 10
        return total + log_area(self.d)

    def truth(self, estimator: str, batch: int) -> tuple[float, str]:
        if estimator == "vmf_kde":
            return self.direction_entropy(), "direction"
        if estimator == "coding_rate":
            return coding_rate_of(self.variances), "rate"
        if estimator == "renyi":
            log_mean = -0.5 * np.log1p(4 * self.variances / BANDWIDTH_SQUARED).sum()
            return kernel_entropy_of(math.exp(log_mean), batch), "kernel"
        return gaussian_entropy_of(self.variances), "entropy"


class DecayingGaussian(Gaussian):
    """The same with a factor of 1000 from the first variance to the last."""

    name = "decaying"
    ratio = 1000.0


class SteepGaussian(Gaussian):
    """The same with a factor of 100,000: about that of image patches of 4x4."""

    name = "steep"
    ratio = 100_000.0


class VonMisesFisher(Law):
    """On the unit sphere, about the first axis, with concentration kappa = d."""

    name = "vmf"

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.kappa = self.concentration(d)
        # the angle to the axis has the density sin^(d-2) exp(kappa cos), smooth even for d = 2
        with np.errstate(divide="ignore"):
            log_sin = np.log(np.sin(ANGLES).clip(min=0))
        power = (d - 2) * log_sin if d > 2 else np.zeros_like(ANGLES)
        log_density = power + self.kappa * np.cos(ANGLES)
        density = np.exp(log_density - log_density.max())
        self.mass = density / density.sum()
        self.mean_length = float(self.mass @ np.cos(ANGLES))

    def concentration(self, d: int) -> float:
        return float(d)

    def sample(self, batch: int, generator: np.random.Generator) -> np.ndarray:
        angle = np.interp(generator.random(batch), np.cumsum(self.mass), ANGLES)
        around = generator.standard_normal((batch, self.d - 1))
        around /= np.linalg.norm(around, axis=1, keepdims=True)
        return np.concatenate([np.cos(angle)[:, None], np.sin(angle)[:, None] * around], 1)

    def entropy(self) -> float:
        return -log_vmf_normalizer(self.d, self.kappa).item() - self.kappa * self.mean_length

    def second_moments(self) -> np.ndarray:
        along = float(self.mass @ np.cos(ANGLES) ** 2)
        return np.array([along] + [(1 - along) / (self.d - 1)] * (self.d - 1))

    def kernel_mean_square(self) -> float:
        # E' exp(t u.u') = C(kappa) / C(|kappa mu + t u|), then the mean over u's angle
        t = 2 / BANDWIDTH_SQUARED
        lengths = np.sqrt(self.kappa**2 + t**2 + 2 * self.kappa * t * np.cos(ANGLES))
        log_c = log_vmf_normalizer(self.d, torch.from_numpy(lengths)).numpy()
        ratio = np.exp(log_vmf_normalizer(self.d, self.kappa).item() - log_c)
        return math.exp(-t) * float(self.mass @ ratio)

    def truth(self, estimator: str, batch: int) -> tuple[float, str]:
        if estimator == "knn":
            return knn_on_a_sphere(self.entropy(), self.d, batch), "surface"
        if estimator == "coding_rate":
            return coding_rate_of(self.second_moments()), "rate"
        if estimator == "renyi":
            return kernel_entropy_of(self.kernel_mean_square(), batch), "kernel"
        if estimator == "gaussian":
            variances = self.second_moments()
            variances[0] -= self.mean_length**2
            return gaussian_entropy_of(variances), "moment"
        return self.entropy(), "entropy"


class UniformOnSphere(VonMisesFisher):
    """The von Mises-Fisher law without concentration."""

    name = "uniform"

    def concentration(self, d: int) -> float:
        return 0.0


LAWS: tuple[type[Law], ...] = (
    Gaussian,
    DecayingGaussian,
    SteepGaussian,
    UniformOnSphere,
    VonMisesFisher,
)


def value_and_milliseconds(estimator: str, z: Tensor) -> tuple[float, float]:
    z.requires_grad_()
    start = time.perf_counter()
    value = estimate(estimator, z)
    value.backward()
    result = value.item()
    return result, 1e3 * (time.perf_counter() - start)


def table(
    draws: int,
    dimensions: tuple[int, ...] = DIMENSIONS,
    batches: tuple[int, ...] = BATCHES,
    device: str = "cpu",
) -> Iterator[Row]:
    for law_type in LAWS:
        for d in dimensions:
            law = law_type(d)
            for batch in batches:
                generator = np.random.default_rng(0)
                samples = [law.sample(batch, generator) for _ in range(draws)]
                rows = [torch.from_numpy(s).float().to(device) for s in samples]
                for estimator in ESTIMATORS:
                    results = [value_and_milliseconds(estimator, z.clone()) for z in rows]
                    values = [value for value, _ in results]
                    truth, target = law.truth(estimator, batch)
                    mean = statistics.fmean(values)
                    yield Row(
                        estimator=estimator,
                        law=law.name,
                        d=d,
                        B=batch,
                        value=mean,
                        truth=truth,
                        target=target,
                        bias=mean - truth,
                        std=statistics.stdev(values),
                        ms=statistics.median(ms for _, ms in results),
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=20, help="batches a row, at least 2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="entropy_table.csv")
    options = parser.parse_args()
    if options.draws < 2:
        parser.error(f"--draws {options.draws}: at least 2 are needed")
    names = [field.name for field in fields(Row)]
    print("".join(f"{name:>12}" for name in names))
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in table(options.draws, device=options.device):
            cells = asdict(row)
            writer.writerow(cells)
            shown = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in cells.values()]
            print("".join(f"{cell:>12}" for cell in shown), flush=True)


if __name__ == "__main__":
    main()
