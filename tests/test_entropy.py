"""Entropy estimators against closed forms, references written a second way, and gradcheck."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from iecl_solo import entropy
from iecl_solo.entropy import ESTIMATORS, coding_rate, estimate, gaussian_entropy, gaussian_kl
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


def test_doctests():
    assert doctest.testmod(entropy).failed == 0


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
    assert torch.autograd.gradcheck(
        lambda q: gaussian_kl(q, anchor.detach(), covariance=covariance), query
    )


DIFFERENTIABLE = {
    "gaussian": lambda z: gaussian_entropy(z),
    "gaussian diagonal": lambda z: gaussian_entropy(z, covariance="diagonal"),
    "coding_rate": lambda z: coding_rate(z),
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
        (lambda z: coding_rate(z, eps=0.0), "eps=0.0"),
        (lambda z: gaussian_entropy(z, covariance="diag"), "'diagonal'"),
        (lambda z: gaussian_entropy(z, shrinkage=1.5), "0 to 1"),
        (lambda z: gaussian_kl(z, z[:, :2]), "3 dimensions, anchor of 2"),
        (lambda z: gaussian_kl(z, z, covariance="fill"), "'full'"),
    ],
)
def test_bad_options_are_refused_in_one_line(call, says):
    with pytest.raises(IECLError) as error:
        call(rows(4, 3))
    assert says in str(error.value) and "\n" not in str(error.value)
