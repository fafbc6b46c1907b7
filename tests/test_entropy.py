"""Entropy estimators against closed forms, references written a second way, and gradcheck."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from support import in_two_processes, mebibytes, script
from torch import Tensor

from iecl_solo import entropy
from iecl_solo.entropy import (
    ESTIMATORS,
    all_gather_batch,
    coding_rate,
    effective_rank,
    estimate,
    gaussian_entropy,
    gaussian_kl,
    knn_entropy,
    log_vmf_normalizer,
    renyi_entropy,
    vmf_kde_entropy,
)
from iecl_solo.errors import IECLError


def rows(batch: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype)


def shrunk_covariance(z: Tensor, a: float) -> Tensor:
    """The d x d matrix itself, where the code never forms it."""
    dim = z.shape[1]
    s = torch.cov(z.T).reshape(dim, dim)
    return (1 - a) * s + (a * s.trace() / dim + entropy.VARIANCE_FLOOR) * torch.eye(dim).to(z)


SHAPES = [(2, 3), (8, 3), (8, 8), (5, 40), (64, 16)]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_entropy_is_the_log_det_of_the_shrunk_covariance(shape, dtype):
    z = rows(*shape, dtype=dtype) * 3 + 1
    for a in (0.1, 0.7, 1.0):
        s = shrunk_covariance(z.double(), a)
        full = 0.5 * torch.logdet(2 * math.pi * math.e * s)
        diagonal = 0.5 * (2 * math.pi * math.e * s.diagonal()).log().sum()
        tolerance = {"rel": 1e-5 if dtype == torch.float32 else 1e-10}
        assert gaussian_entropy(z, shrinkage=a).item() == pytest.approx(full.item(), **tolerance)
        got = gaussian_entropy(z, covariance="diagonal", shrinkage=a)
        assert got.item() == pytest.approx(diagonal.item(), **tolerance)
        assert got.dtype == dtype and got.shape == ()


def test_gaussian_entropy_of_a_known_gaussian():
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    mix = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.2], [0.0, 0.0, 1.0]], dtype=torch.float64)
    z = rows(20000, 3) * scale @ mix + 5
    truth = 1.5 * math.log(2 * math.pi * math.e) + scale.log().sum().item()
    # standard deviation of the estimate: sqrt(d / 2B) = 0.009
    assert gaussian_entropy(z, shrinkage=0).item() == pytest.approx(truth, abs=0.04)


DECAYING = torch.logspace(0, -math.log10(37.3), 8, dtype=torch.float64) * 30.7


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_entropy_of_a_decaying_spectrum(dtype):
    truth = 0.5 * (2 * math.pi * math.e * DECAYING).log().sum().item()
    assert truth == pytest.approx(17.81, abs=0.01)
    z = (rows(20000, 8) * DECAYING.sqrt() + 3).to(dtype)
    # standard deviation of the estimate: sqrt(d / 2B) = 0.014
    assert gaussian_entropy(z).item() == pytest.approx(truth, abs=0.05)
    assert gaussian_entropy(z, covariance="diagonal").item() == pytest.approx(truth, abs=0.05)
    assert gaussian_entropy(z, shrinkage=0.1).item() == pytest.approx(truth + 0.74, abs=0.05)


def test_the_rows_own_shrinkage_vanishes_as_rows_are_added():
    def excess(batch: int, covariance: str) -> float:
        z = rows(batch, 8) * DECAYING.sqrt()
        own, none = (gaussian_entropy(z, covariance=covariance, shrinkage=a) for a in (None, 0))
        return (own - none).item()

    for covariance in ("full", "diagonal"):
        few, more, many = (excess(batch, covariance) for batch in (32, 320, 3200))
        # faster than 1/B, which is what least squares alone would give
        assert few > 30 * more > 900 * many > 0


@pytest.mark.parametrize("shape", [(9, 4), (40, 4), (40, 30), (6, 30)])
def test_the_rows_own_shrinkage_is_chens_times_a_factor(shape):
    z = rows(*shape) * torch.linspace(1, 3, shape[1], dtype=torch.float64)
    batch, dim = shape
    s = torch.cov(z.T)
    trace, of_square = s.trace(), s.square().sum()
    n = batch - 1
    oas = ((1 - 2 / dim) * of_square + trace**2) / (
        (n + 1 - 2 / dim) * (of_square - trace**2 / dim)
    )
    a = min(1.0, oas.item()) * dim / (dim + n)
    assert gaussian_entropy(z).item() == pytest.approx(gaussian_entropy(z, shrinkage=a).item())


def test_gaussian_kl_sees_the_small_eigenvalues():
    """Partial whitening at a fixed trace, of a spectrum as steep as that of image patches."""
    s = torch.logspace(0, -5, 24, dtype=torch.float64)
    low, high = 0.0, 1e6
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (2 / (1 / s + mu)).sum() > s.sum() else (low, mu)
    whitened = 2 / (1 / s + mu)
    truth = 0.5 * (whitened / s - 1 - (whitened / s).log()).sum().item()
    query = rows(8192, 24, seed=1) * whitened.sqrt()
    anchor = rows(8192, 24, seed=2) * s.sqrt()
    fitted = 24 * 27 / (2 * 8192)
    got = gaussian_kl(query, anchor, covariance="full").item()
    assert got == pytest.approx(truth + fitted, rel=0.05)
    fixed = gaussian_kl(query, anchor, covariance="full", shrinkage=0.1).item()
    assert fixed < truth / 2


@pytest.mark.parametrize(
    ("covariance", "constant"), [("diagonal", 2 * 6), ("full", 6 * (6 + 3) / 2)]
)
def test_gaussian_kl_of_two_batches_of_one_law(covariance, constant):
    batch = 400
    values = [
        gaussian_kl(
            rows(batch, 6, seed=2 * i), rows(batch, 6, seed=2 * i + 1), covariance=covariance
        )
        for i in range(200)
    ]
    assert batch * torch.stack(values).mean().item() == pytest.approx(constant, rel=0.1)


def test_gaussian_entropy_grows_by_log_scale():
    z = rows(32, 6)
    gained = gaussian_entropy(4 * z) - gaussian_entropy(z)
    assert gained.item() == pytest.approx(6 * math.log(4), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_coding_rate_is_the_log_det_on_either_side(shape, dtype):
    z = rows(*shape, dtype=dtype)
    batch, dim = shape
    big = z.double()
    for eps in (0.1, 0.5):
        c = dim / (batch * eps**2)
        by_columns = 0.5 * torch.logdet(torch.eye(dim, dtype=big.dtype) + c * big.T @ big)
        by_singular_values = 0.5 * (c * torch.linalg.svdvals(big).square()).log1p().sum()
        got = coding_rate(z, eps=eps)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        assert got.item() == pytest.approx(by_columns.item(), rel=tolerance)
        assert got.item() == pytest.approx(by_singular_values.item(), rel=tolerance)
        assert got.dtype == dtype and got.shape == ()


def test_coding_rate_is_not_centred():
    z = torch.ones(8, 3)
    assert coding_rate(z).item() == pytest.approx(0.5 * math.log(1 + 3 * 3 / 0.25), rel=1e-5)


@pytest.mark.parametrize("shape", [(200, 24), (24, 200), (64, 64), (2, 3)])
@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_coding_rate_of_rows_far_from_the_origin(shape, offset):
    z = (rows(*shape) + offset * rows(1, shape[1], seed=1)).float().requires_grad_()
    exact = z.detach().double().requires_grad_()
    value, truth = coding_rate(z), coding_rate(exact)
    by_singular_values = (shape[1] / shape[0] / 0.25) * torch.linalg.svdvals(exact).square()
    assert truth.item() == pytest.approx(0.5 * by_singular_values.log1p().sum().item(), rel=1e-6)
    assert value.item() == pytest.approx(truth.item(), rel=1e-3)
    value.backward()
    truth.backward()
    difference = (z.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert difference < 1e-2


def test_coding_rate_of_very_long_rows_is_finite():
    z = (rows(8, 40, torch.float32) * 1e5).requires_grad_()
    value = coding_rate(z)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()
    c = 40 / (8 * 0.25)
    truth = 0.5 * (c * torch.linalg.svdvals(z.detach().double()).square()).log1p().sum()
    assert value.item() == pytest.approx(truth.item(), rel=1e-4)


def kl_by_torch(query: Tensor, anchor: Tensor, cov_q: Tensor, cov_a: Tensor) -> float:
    normal = torch.distributions.MultivariateNormal
    q = normal(query.mean(0), covariance_matrix=cov_q)
    a = normal(anchor.mean(0), covariance_matrix=cov_a)
    return torch.distributions.kl_divergence(q, a).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", [(9, 17, 4), (2, 3, 5), (12, 7, 30)])
def test_gaussian_kl_against_torch_distributions(dtype, batches):
    b_q, b_a, dim = batches
    query, anchor = rows(b_q, dim, dtype, 1) * 1.5 + 0.5, rows(b_a, dim, dtype, 2)
    q, a = query.double(), anchor.double()
    rel = 1e-4 if dtype == torch.float32 else 1e-9
    full = kl_by_torch(q, a, shrunk_covariance(q, 0.2), shrunk_covariance(a, 0.2))
    got = gaussian_kl(query, anchor, covariance="full", shrinkage=0.2)
    assert got.item() == pytest.approx(full, rel=rel) and got.dtype == dtype

    def floored(z: Tensor) -> Tensor:
        v = z.var(0)
        return (v + 1e-4 * v.mean() + entropy.VARIANCE_FLOOR).diag()

    diagonal = kl_by_torch(q, a, floored(q), floored(a))
    assert gaussian_kl(query, anchor).item() == pytest.approx(diagonal, rel=rel)


def test_gaussian_kl_of_known_gaussians():
    query, anchor = rows(50000, 2, seed=1) * 2 + 1, rows(40000, 2, seed=2)
    truth = 2 * 0.5 * (4 + 1 - 1 - math.log(4))
    # standard error from the variance estimates about 0.02
    assert gaussian_kl(query, anchor).item() == pytest.approx(truth, abs=0.08)
    full = gaussian_kl(query, anchor, covariance="full")
    assert full.item() == pytest.approx(truth, abs=0.08)
    # and it is the query's on the left: the other way round is another number
    assert gaussian_kl(anchor, query).item() == pytest.approx(
        2 * 0.5 * (0.25 + 0.25 - 1 + math.log(4)), abs=0.03
    )


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_gaussian_kl_of_equal_batches_is_zero(covariance):
    z = rows(6, 20)
    assert gaussian_kl(z, z, covariance=covariance).item() == pytest.approx(0, abs=1e-9)
    shuffled = z[torch.randperm(6)]
    assert gaussian_kl(shuffled, z, covariance=covariance).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_gaussian_kl_gives_the_anchor_no_gradient(covariance):
    query, anchor = rows(6, 4, seed=1).requires_grad_(), rows(6, 4, seed=2).requires_grad_()
    gaussian_kl(query, anchor, covariance=covariance).backward()
    assert query.grad.abs().sum() > 0 and anchor.grad is None
    value = gaussian_kl(query.detach(), anchor, covariance=covariance)
    assert not value.requires_grad
    (value + anchor.sum()).backward()  # what is added to it keeps its own
    assert torch.autograd.gradcheck(
        lambda q: gaussian_kl(q, anchor.detach(), covariance=covariance), query
    )


def knn_slowly(z: Tensor, k: int) -> float:
    batch, dim = z.shape
    logs = []
    for i in range(batch):
        distances = sorted(math.dist(z[i].tolist(), z[j].tolist()) for j in range(batch) if j != i)
        logs.append(math.log(distances[k - 1]))
    ball = math.pi ** (dim / 2) / math.gamma(dim / 2 + 1)
    digammas = scipy.special.digamma(batch) - scipy.special.digamma(k)
    return digammas + math.log(ball) + dim * sum(logs) / batch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_knn_entropy_against_loops(shape, dtype):
    z = rows(*shape, dtype=dtype)
    for k in range(1, min(4, shape[0])):
        got = knn_entropy(z, num_neighbors=k)
        rel = 1e-4 if dtype == torch.float32 else 1e-10
        assert got.item() == pytest.approx(knn_slowly(z, k), rel=rel) and got.dtype == dtype


def test_knn_entropy_of_known_densities():
    # bias of order B^(-2/d), standard deviation about sqrt((1/k + d/2) / B) = 0.02
    z = rows(4000, 2) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    assert knn_entropy(z).item() == pytest.approx(math.log(2 * math.pi * math.e), abs=0.08)
    box = 3 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert knn_entropy(box).item() == pytest.approx(2 * math.log(3), abs=0.08)


def test_knn_entropy_takes_as_many_neighbours_as_there_are():
    z = rows(3, 4)
    assert knn_entropy(z, num_neighbors=9) == knn_entropy(z, num_neighbors=2)


@pytest.mark.parametrize(("d", "spread"), [(2, 1e-4), (16, 1e-4), (128, 3e-4)])
def test_knn_entropy_finds_the_nearest_within_tight_clusters(d, spread):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, d, generator=generator).repeat(64, 1)
    z = (centres + spread * torch.randn(256, d, generator=generator)).requires_grad_()
    wide = z.detach().double().requires_grad_()
    found, expected = knn_entropy(z), knn_entropy(wide)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    gradients = [torch.autograd.grad(*pair)[0] for pair in ((found, z), (expected, wide))]
    torch.testing.assert_close(gradients[0], gradients[1].float(), rtol=0.05, atol=1.0)


def test_knn_entropy_is_not_fooled_by_a_far_origin():
    z = rows(30, 3, torch.float32)
    assert knn_entropy(z + 1000).item() == pytest.approx(knn_entropy(z).item(), abs=1e-2)


DIMENSIONS = [2, 3, 4, 5, 8, 16, 33, 34, 35, 128, 1000, 4096]
CONCENTRATIONS = [1e-3, 0.5, 3.0, 16.0, 100.0, 1111.0, 1e4]


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("kappa", CONCENTRATIONS)
def test_log_vmf_normalizer_against_mpmath(d, kappa):
    with mpmath.workdps(30):
        order = mpmath.mpf(d) / 2 - 1
        bessel = mpmath.besseli(order, kappa)
        truth = order * mpmath.log(kappa) - mpmath.log(bessel)
        truth = float(truth - mpmath.mpf(d) / 2 * mpmath.log(2 * mpmath.pi))
        mean_length = float(mpmath.besseli(order + 1, kappa) / bessel)
    k = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
    got = log_vmf_normalizer(d, k)
    assert got.item() == pytest.approx(truth, rel=1e-8, abs=3e-8)
    assert log_vmf_normalizer(d, kappa).item() == got.item()
    single = log_vmf_normalizer(d, torch.tensor(kappa))
    assert single.dtype == torch.float32 and single.item() == pytest.approx(truth, rel=1e-5)
    got.backward()
    assert -k.grad.item() == pytest.approx(mean_length, rel=2e-7)


@pytest.mark.parametrize("d", [2, 3, 7, 40, 100])
@pytest.mark.parametrize("kappa", [0.5, 20.0, 300.0])
def test_log_vmf_normalizer_against_scipy(d, kappa):
    order = d / 2 - 1
    log_bessel = math.log(scipy.special.ive(order, kappa)) + kappa
    truth = order * math.log(kappa) - d / 2 * math.log(2 * math.pi) - log_bessel
    assert log_vmf_normalizer(d, kappa).item() == pytest.approx(truth, rel=1e-7)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_log_vmf_normalizer_without_concentration_is_one_over_the_area(d):
    log_area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
    kappa = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = log_vmf_normalizer(d, kappa)
    assert value.shape == (2, 3) and value[0, 0].item() == pytest.approx(-log_area, rel=1e-9)
    value.sum().backward()
    assert torch.equal(kappa.grad, torch.zeros_like(kappa))


@pytest.mark.parametrize("d", [2, 9, 64])
def test_log_vmf_normalizer_gradients(d):
    kappa = torch.tensor([0.3, 7.0, 60.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: log_vmf_normalizer(d, k), kappa)


def vmf_kde_slowly(z: Tensor, kappa: float) -> float:
    batch, dim = z.shape
    unit = [[x / math.hypot(*row) for x in row] for row in z.tolist()]
    total = mpmath.mpf(0)
    for i in range(batch):
        pairs = (zip(unit[i], unit[j], strict=True) for j in range(batch) if j != i)
        others = (sum(x * y for x, y in pair) for pair in pairs)
        total += mpmath.log(sum(mpmath.exp(kappa * dot) for dot in others) / (batch - 1))
    order = mpmath.mpf(dim) / 2 - 1
    normalizer = kappa**order / (2 * mpmath.pi) ** (order + 1) / mpmath.besseli(order, kappa)
    return float(-total / batch - mpmath.log(normalizer))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vmf_kde_entropy_against_loops(shape, dtype):
    z = rows(*shape, dtype=dtype)
    for kappa in (0.7, 10.0, 400.0):
        got = vmf_kde_entropy(z, concentration=kappa)
        rel = 1e-5 if dtype == torch.float32 else 1e-7
        assert got.item() == pytest.approx(vmf_kde_slowly(z, kappa), rel=rel)
        assert got.dtype == dtype


@pytest.mark.parametrize("d", [2, 16, 128])
def test_vmf_kde_entropy_of_the_uniform_law_is_the_log_area(d):
    log_area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
    # unbiased up to the variance of a mean over B - 1 kernels, 0.5 exp(kappa^2 / d) / B at most
    assert vmf_kde_entropy(rows(2000, d)).item() == pytest.approx(log_area, abs=0.02)


def test_vmf_kde_entropy_of_a_von_mises_law():
    # d = 2: the angle has the density exp(kappa cos t) / (2 pi I_0(kappa))
    kappa = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    log_c = log_vmf_normalizer(2, kappa)
    (minus_mean_length,) = torch.autograd.grad(log_c, kappa)
    truth = (-log_c + kappa * minus_mean_length).item()
    torch.manual_seed(0)
    angle = torch.distributions.VonMises(torch.zeros(()), kappa.detach()).sample((3000,))
    z = torch.stack([angle.cos(), angle.sin()], 1)
    # the kernel's width of 0.1 adds about half the Fisher information over kappa_kernel: 0.007
    got = vmf_kde_entropy(z, concentration=100.0).item()
    assert got == pytest.approx(truth, abs=0.06)
    assert abs(got - math.log(2 * math.pi)) > 0.3


def test_vmf_kde_entropy_ignores_length():
    z = rows(9, 5)
    lengths = torch.linspace(0.1, 10, 9, dtype=torch.float64)[:, None]
    assert vmf_kde_entropy(z * lengths).item() == pytest.approx(vmf_kde_entropy(z).item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.5, 1, 1.01, 2, 2.0001, 3])
def test_renyi_entropy_against_the_eigenvalues(shape, dtype, alpha):
    z = rows(*shape, dtype=dtype)
    kernel = [[math.exp(-0.5 * math.dist(a, b) ** 2 / 4) for a in z.tolist()] for b in z.tolist()]
    matrix = torch.tensor(kernel, dtype=torch.float64) / shape[0]
    p = torch.linalg.eigh(matrix).eigenvalues.clamp(min=1e-15)
    truth = -(p * p.log()).sum() if alpha == 1 else (p**alpha).sum().log() / (1 - alpha)
    got = renyi_entropy(z, alpha=alpha, bandwidth=2.0)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    assert got.item() == pytest.approx(truth.item(), rel=tolerance) and got.dtype == dtype


def test_renyi_entropy_of_order_two_has_the_kernel_mean_as_its_limit():
    # E exp(-|z - z'|^2 / s^2) of two standard normal vectors: (1 + 4 / s^2)^(-d/2)
    d, s, batch = 3, 1.5, 3000
    mean = (1 + 4 / s**2) ** (-d / 2)
    truth = -math.log(1 / batch + (1 - 1 / batch) * mean)
    assert renyi_entropy(rows(batch, d), bandwidth=s).item() == pytest.approx(truth, abs=0.03)


def test_renyi_entropy_by_default_is_minus_the_uniformity_loss():
    z = F.normalize(rows(12, 6))
    pairs = torch.cdist(z, z).square()
    assert renyi_entropy(z).item() == pytest.approx(-(-2 * pairs).exp().mean().log().item())


def test_renyi_entropy_of_a_large_order_does_not_underflow():
    assert renyi_entropy(100 * torch.eye(128), alpha=200).item() == pytest.approx(math.log(128))


def test_renyi_entropy_bounds():
    far, equal = 1e3 * torch.eye(7).double(), torch.ones(7, 4).double()
    for alpha in (0.5, 1, 2, 3):
        assert renyi_entropy(far, alpha=alpha).item() == pytest.approx(math.log(7), abs=1e-4)
        assert renyi_entropy(equal, alpha=alpha).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_renyi_entropy_of_rows_with_a_known_spectrum(alpha, dtype):
    # groups of equal rows, far apart: as many eigenvalues as groups, each its share, and zeros
    equal = rows(1, 16, dtype).repeat(256, 1).requires_grad_()
    value = renyi_entropy(equal, alpha=alpha)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and equal.grad.abs().max() < 1e-6
    sizes = (10, 30, 60)
    groups = torch.cat([rows(1, 16, dtype, seed).repeat(n, 1) * 30 for seed, n in enumerate(sizes)])
    p = torch.tensor(sizes, dtype=torch.float64) / 100
    truth = torch.special.entr(p).sum() if alpha == 1 else p.pow(alpha).sum().log() / (1 - alpha)
    assert renyi_entropy(groups, alpha=alpha).item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_effective_rank(dtype):
    assert effective_rank(rows(1, 6, dtype).repeat(5, 1)).item() == pytest.approx(1, abs=1e-4)
    orthogonal = torch.linalg.qr(rows(20, 7))[0].to(dtype)
    assert effective_rank(orthogonal).item() == pytest.approx(7, abs=1e-4)
    assert effective_rank(1e3 * orthogonal.T).item() == pytest.approx(7, abs=1e-4)
    scaled = orthogonal * torch.tensor([1.0, 1.0, 0.5, 0, 0, 0, 0]).to(dtype)
    entropy_of_shares = 2 * 0.4 * math.log(2.5) + 0.2 * math.log(5)
    assert effective_rank(scaled).item() == pytest.approx(math.exp(entropy_of_shares), abs=1e-4)
    assert effective_rank(torch.zeros(4, 3, dtype=dtype)).item() == pytest.approx(1, abs=1e-4)


def entropy_table():
    return script(Path(__file__).parents[1] / "studies" / "entropy_table.py")


def test_the_benchmark_table_holds_each_estimator_to_its_closed_form():
    found = list(entropy_table().table(draws=10, dimensions=(2,), batches=(256,)))
    assert {(row.estimator, row.law) for row in found} == {
        (name, law)
        for name in ESTIMATORS
        for law in ("gaussian", "decaying", "steep", "uniform", "vmf")
    }
    for row in found:
        # a vMF kernel and k neighbours of 256 are wider than the second axis of these laws
        too_wide = {"vmf_kde": ("decaying", "steep"), "knn": ("steep",), "gaussian": ("steep",)}
        if row.law not in too_wide.get(row.estimator, ()):
            assert abs(row.bias) < 0.08 + 4 * row.std / math.sqrt(10), row
        else:
            assert row.bias > 0.5, row


@pytest.mark.parametrize("d", [3, 5])
def test_vmf_kde_entropy_of_a_von_mises_fisher_law(d):
    law = entropy_table().VonMisesFisher(d)
    z = torch.from_numpy(law.sample(4000, np.random.default_rng(0)))
    # the mean resultant length A_d(kappa), by the Bessel functions, is the sample's
    with mpmath.workdps(20):
        bessel = mpmath.besseli(d / 2 - 1, law.kappa)
        length = float(mpmath.besseli(d / 2, law.kappa) / bessel)
    assert z[:, 0].mean().item() == pytest.approx(length, abs=0.02)
    truth = -log_vmf_normalizer(d, law.kappa).item() - law.kappa * length
    assert law.entropy() == pytest.approx(truth, abs=1e-6)
    # a kernel of ten times the concentration adds about (d - 1)/2 log(1 + 1/10), few rows the rest
    got = vmf_kde_entropy(z, concentration=10 * law.kappa).item()
    assert -0.05 < got - truth < (d - 1) / 2 * math.log(1.1) + 0.1


WORKER = """
from iecl_solo.entropy import ESTIMATORS, all_gather_batch, estimate
linear = torch.nn.Linear(5, 4).double()
linear.load_state_dict(given["linear"])
model, result = DistributedDataParallel(linear), {}
for name in ESTIMATORS:
    model.zero_grad()
    rows = all_gather_batch(model(given["x"].chunk(2)[rank]))
    value = estimate(name, rows)
    value.backward()
    grads = [p.grad.clone() for p in linear.parameters()]
    result[name] = value.detach(), grads, rows.detach()
"""


def test_two_processes_give_the_value_and_gradient_of_one(tmp_path):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(5, 4).double(), rows(12, 5)
    given = {"linear": linear.state_dict(), "x": x}
    for results in in_two_processes(WORKER, given, tmp_path):
        for name in ESTIMATORS:
            linear.zero_grad()
            value = estimate(name, linear(x))
            value.backward()
            got_value, got_grads, got_rows = results[name]
            torch.testing.assert_close(got_rows, linear(x).detach())
            torch.testing.assert_close(got_value, value.detach())
            for got, p in zip(got_grads, linear.parameters(), strict=True):
                torch.testing.assert_close(got, p.grad)
            # gathering without gradients, or a loss per process, would not pass for this
            assert max(p.grad.abs().max() for p in linear.parameters()) > 1e-3


def test_all_gather_batch_alone_is_the_identity():
    z = rows(3, 2)
    assert all_gather_batch(z) is z


DIFFERENTIABLE = {
    "gaussian": lambda z: gaussian_entropy(z),
    "gaussian diagonal": lambda z: gaussian_entropy(z, covariance="diagonal"),
    "coding_rate": lambda z: coding_rate(z),
    "knn": lambda z: knn_entropy(z),
    "vmf_kde": lambda z: vmf_kde_entropy(z),
    "vmf_kde narrow": lambda z: vmf_kde_entropy(z, concentration=1e4),
    "renyi": lambda z: renyi_entropy(z),
    "renyi half": lambda z: renyi_entropy(z, alpha=0.5),
    "renyi von Neumann": lambda z: renyi_entropy(z, alpha=1),
    "renyi near Shannon": lambda z: renyi_entropy(z, alpha=1.01),
    "effective_rank": lambda z: effective_rank(z),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", [(2, 3), (7, 3), (4, 9)])
def test_gradients(name, shape):
    assert torch.autograd.gradcheck(DIFFERENTIABLE[name], rows(*shape).requires_grad_())


HARD = {
    "two rows": rows(2, 5),
    "wide": rows(4, 300),
    "equal rows": rows(1, 8).repeat(6, 1),
    "zero rows": torch.zeros(6, 8, dtype=torch.float64),
    "equal wide rows": rows(1, 300).repeat(6, 1),
    "one pair of equal rows": torch.cat([rows(5, 8), rows(1, 8), rows(1, 8)]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_are_finite(name, case, dtype):
    z = HARD[case].to(dtype, copy=True).requires_grad_()
    value = DIFFERENTIABLE[name](z)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_kl_is_finite(covariance, case, dtype):
    hard = HARD[case].to(dtype)
    easy = rows(7, hard.shape[1], dtype, seed=3)
    for query, anchor in ((hard, easy), (easy, hard), (hard, hard)):
        query = query.clone().requires_grad_()
        value = gaussian_kl(query, anchor, covariance=covariance)
        value.backward()
        assert value.isfinite() and query.grad.isfinite().all()


@pytest.mark.parametrize("shrinkage", [0.0, 1.0])
def test_gaussian_entropy_without_shrinkage_is_finite_beyond_its_rank(shrinkage):
    z = torch.nn.functional.normalize(rows(64, 2048, torch.float32)).requires_grad_()
    value = gaussian_entropy(z, shrinkage=shrinkage)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    z = rows(8, 5, dtype)
    got = DIFFERENTIABLE[name](z)
    assert got.dtype == torch.float32
    assert torch.equal(got, DIFFERENTIABLE[name](z.float()))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_changes_nothing(name):
    z = rows(16, 8, torch.float32).requires_grad_()
    plain = DIFFERENTIABLE[name](z)
    (plain_grad,) = torch.autograd.grad(plain, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = DIFFERENTIABLE[name](z)
    (inside_grad,) = torch.autograd.grad(inside, z)
    assert torch.equal(plain, inside) and torch.equal(plain_grad, inside_grad)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("case", HARD)
def test_half_precision_gradients_are_finite(name, case):
    z = HARD[case].half().requires_grad_()
    DIFFERENTIABLE[name](z).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_backward_pass_is_in_full_precision_too(name):
    z = rows(64, 256, torch.float32).requires_grad_()
    DIFFERENTIABLE[name](z).backward()
    plain, z.grad = z.grad, None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            DIFFERENTIABLE[name](z).backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(z.grad, plain)


def test_the_gradient_of_a_kl_is_in_full_precision_too():
    query, anchor = rows(64, 24, torch.float32).requires_grad_(), rows(64, 24, torch.float32, 1)
    (plain,) = torch.autograd.grad(gaussian_kl(query, anchor, covariance="full"), query)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(gaussian_kl(query, anchor, covariance="full"), query)
    assert torch.equal(plain, inside)


def test_a_graph_can_be_gone_through_twice_and_no_second_derivative_is_pretended():
    z = rows(6, 3).requires_grad_()
    value = coding_rate(z)
    (first,) = torch.autograd.grad(value, z, retain_graph=True)
    (second,) = torch.autograd.grad(value, z, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="does not require grad"):
        second.sum().backward()


IN_BLOCKS = ["knn", "vmf_kde", "renyi"]


@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_change_neither_value_nor_gradient(name, dtype, monkeypatch):
    z = rows(50, 6, dtype).requires_grad_()
    whole = estimate(name, z)
    whole.backward()
    whole_gradient, z.grad = z.grad, None
    monkeypatch.setattr(entropy, "BLOCK_ELEMENTS", 7 * 50)
    blocks = estimate(name, z)
    blocks.backward()
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(z.grad, whole_gradient)


MEMORY = """
import sys, torch
from iecl_solo import entropy
entropy.BLOCK_ELEMENTS = 2**20
z = torch.nn.functional.normalize(torch.randn(4096, 32)).requires_grad_()
entropy.estimate(sys.argv[1], z[:2048]).backward()  # the first call loads libraries
before = peak()
entropy.estimate(sys.argv[1], z).backward()
print(peak() - before)
"""


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_memory_does_not_grow_with_the_square_of_the_batch(name):
    """One (B, B) matrix is 64 MiB, a block of its rows 4, and a value and gradient hold several."""
    assert mebibytes(MEMORY, name) < 40


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_matmul_precision_changes_nothing_and_is_left_as_it_was(name):
    # "medium" multiplies in bfloat16 on a CPU that can, and in TF32 on a GPU
    z = rows(64, 256, torch.float32)
    plain = DIFFERENTIABLE[name](z)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(DIFFERENTIABLE[name](z), plain)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(IECLError):
            coding_rate(z, eps=-1.0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_nan_rows_give_nan_and_do_not_end_the_run(name):
    assert DIFFERENTIABLE[name](torch.full((4, 3), math.nan)).isnan()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_rows_does_not_matter(name):
    z = rows(12, 5)
    assert estimate(name, z).item() == pytest.approx(estimate(name, z.flip(0)).item(), abs=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4), torch.zeros(1, 3), torch.zeros(2, 3, 4), torch.ones(3, 3).long()],
)
def test_bad_rows_are_refused_in_one_line(name, bad):
    with pytest.raises(IECLError) as error:
        estimate(name, bad)
    assert "\n" not in str(error.value) and "needed" in str(error.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda z: estimate("codingrate", z), "did you mean 'coding_rate'"),
        (lambda z: estimate("coding_rate", z, epz=1.0), "did you mean 'eps'"),
        (lambda z: coding_rate(z, eps=0.0), "eps: 0.0"),
        (lambda z: gaussian_entropy(z, covariance="diag"), "'diagonal'"),
        (lambda z: gaussian_entropy(z, shrinkage=1.5), "0 to 1"),
        (lambda z: knn_entropy(z, num_neighbors=0), "num_neighbors: 0"),
        (lambda z: knn_entropy(z, num_neighbors=2.5), "num_neighbors: 2.5"),
        (lambda z: vmf_kde_entropy(z, concentration=-1.0), "concentration: -1.0"),
        (lambda z: vmf_kde_entropy(z[:, :1]), "at least 2 dimensions"),
        (lambda z: renyi_entropy(z, alpha=0.0), "alpha: 0.0"),
        (lambda z: renyi_entropy(z, bandwidth=math.inf), "bandwidth: inf"),
        (lambda z: log_vmf_normalizer(4, -1.0), "kappa=-1.0"),
        (lambda z: coding_rate(z.numpy()), "ndarray"),
        (lambda z: gaussian_kl(z, z[:, :2]), "3 dimensions, anchor of 2"),
        (lambda z: gaussian_kl(z, z, covariance="fill"), "'full'"),
    ],
)
def test_bad_options_are_refused_in_one_line(call, says):
    with pytest.raises(IECLError) as error:
        call(rows(4, 3))
    assert says in str(error.value) and "\n" not in str(error.value)
