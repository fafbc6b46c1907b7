"""Entropy made at the input: against closed forms, slow references, and by training on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from support import in_two_processes
from torch import Tensor, nn

from iecl_solo.errors import IECLError
from iecl_solo.generation import (
    NOISE_FLOOR,
    conditional_entropy,
    conditional_entropy_bound,
    log_det,
    patch_statistics,
)
from iecl_solo.jacobian import delta_h_split, logabsdet_exact
from iecl_solo.saib import SAIB, ConvexSAIB, NoiseSAIB, patchify, unpatchify


def photographs(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """(count, 3, size, size) crops of scikit-learn's two photographs at half size, normalised.

    Those of clear sky are left out: matched statistics hold a flat image flat whatever is added.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = [
        nn.functional.avg_pool2d(torch.from_numpy(np.array(photo)).permute(2, 0, 1).float(), 2)
        for photo in load_sample_images().images
    ]
    crops: list[Tensor] = []
    while len(crops) < count:
        photo = halves[len(crops) % 2]
        top, left = (
            int(torch.randint(0, side - size + 1, (), generator=generator))
            for side in photo.shape[-2:]
        )
        crop = photo[:, top : top + size, left : left + size]
        if crop.std((1, 2)).mean() > 25:
            crops.append(crop)
    images = torch.stack(crops)
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)


def gaussian_patches(count: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """Images whose patches are Gaussian with these eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    rows = torch.randn(count, n, generator=generator) * spectrum.sqrt() @ basis.T
    patches = rows.view(count // 16, 4, 4, n).permute(0, 3, 1, 2)
    return unpatchify(patches, int((n // 3) ** 0.5))


def moments(x: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the patches, by slicing, in float64."""
    rows = (
        x.double().unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * p * p)
    )
    return rows.mean(0), (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)


# --- patches as Gaussians


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_values_are_those_of_the_distributions(covariance: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8) + 5
    mixing = torch.eye(12) + 0.3 * torch.randn(12, 12)
    y = unpatchify(torch.einsum("ij,bjhw->bihw", mixing, patchify(x, 2)) + 0.5, 2)
    found = patch_statistics([x[:20], x[20:]], [y[:20], y[20:]], 2, covariance=covariance)
    (mean, cov), (mean_made, cov_made) = moments(x, 2), moments(y, 2)
    floor = NOISE_FLOOR * cov.trace() / 12 * torch.eye(12, dtype=torch.float64)
    if covariance == "diagonal":
        cov_kl, cov_made_kl = (torch.diag(m.diagonal()) for m in (cov, cov_made))
    else:
        cov_kl, cov_made_kl = cov, cov_made
    normal = torch.distributions.MultivariateNormal
    made = normal(mean_made, cov_made_kl + floor)
    raw = normal(mean, cov_kl + floor)
    kl = torch.distributions.kl_divergence(made, raw)
    assert found.kl.item() == pytest.approx(kl.item() / 12, rel=1e-4)
    held = cov_made * cov.trace() / cov_made.trace()
    gained = normal(mean, held + floor).entropy() - normal(mean, cov + floor).entropy()
    assert found.beyond_contrast.item() == pytest.approx(gained.item() / 12, abs=1e-5)
    contrast = math.log(cov_made.trace() / cov.trace()) / 2
    assert found.contrast.item() == pytest.approx(contrast, abs=1e-5)
    assert found.delta_h.item() == pytest.approx((gained / 12 + contrast).item(), abs=1e-5)


def test_no_scaling_is_generation() -> None:
    x = photographs(16)
    for scale in (1e-2, 0.5, 3.0, 1e2):
        found = patch_statistics([x], [scale * x + 1], 4)
        assert found.beyond_contrast.item() == pytest.approx(0, abs=1e-4)
        assert found.contrast.item() == pytest.approx(math.log(scale), abs=1e-4)
    whole = patch_statistics([x], [10 * x], 16)  # 768 dimensions, most of them next to flat
    double = patch_statistics([x.double()], [10 * x.double()], 16)
    assert whole.kl.item() == pytest.approx(double.kl.item(), rel=1e-5)
    assert whole.beyond_contrast.item() == pytest.approx(0, abs=1e-4)
    same = patch_statistics([x], [x], 4)
    assert abs(same.kl.item()) < 1e-6 and abs(same.delta_h.item()) < 1e-6


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_an_offset_of_the_images_changes_nothing(offset: float) -> None:
    x = photographs(16)
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    expected = patch_statistics([x.double()], [y.double()], 4)
    found = patch_statistics([x + offset], [y + offset], 4)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.item() == pytest.approx(b.item(), abs=2e-3)


@pytest.mark.parametrize("name", ["delta_h", "contrast", "beyond_contrast", "kl"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    y = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    for covariance in ("full", "diagonal"):
        assert torch.autograd.gradcheck(
            lambda y, c=covariance: getattr(patch_statistics([x], [y], 2, covariance=c), name), (y,)
        )


def test_raw_images_have_no_gradient_and_half_precision_is_lifted() -> None:
    x = photographs(4).requires_grad_()
    saib = SAIB(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = patch_statistics([x], [saib(x.detach())], 4)
    (found.kl - found.delta_h).backward()
    assert found.kl.dtype == torch.float32 and x.grad is None
    half = patch_statistics([x.bfloat16()], [saib(x.detach()).bfloat16()], 4)
    assert half.kl.dtype == torch.float32 and half.kl.isfinite()


@pytest.mark.parametrize(
    "batch", ["constant", "of constant images", "more dimensions than patches", "nan"]
)
def test_degenerate_batches_do_not_end_a_run(batch: str) -> None:
    x = photographs(2)
    made = {"constant": 0 * x, "nan": x * math.nan}.get(batch, 1.1 * x)
    if batch == "of constant images":
        x = torch.full_like(x, 0.3)
        made = x + torch.randn(32, generator=torch.Generator().manual_seed(0))
    made.requires_grad_()
    p = 16 if batch == "more dimensions than patches" else 4
    found = patch_statistics([x], [made], p)
    (found.kl - found.beyond_contrast).backward()
    finite = [v.isfinite().item() for v in found]
    assert finite == [batch != "nan"] * 4
    assert made.grad is not None and bool(made.grad.isfinite().all()) == (batch != "nan")


def test_refusals() -> None:
    x = photographs(2)
    with pytest.raises(IECLError, match="1 raw and 0 transformed"):
        patch_statistics([x], [], 4)
    with pytest.raises(IECLError, match="did you mean 'full'"):
        patch_statistics([x], [x], 4, covariance="ful")
    with pytest.raises(IECLError, match="steps: 0"):
        log_det(lambda x: x, x, steps=0)


WORKER = """
from torch import nn
from iecl_solo.generation import patch_statistics
from iecl_solo.saib import SAIB
saib = SAIB(16).double()
saib.load_state_dict(given["saib"])
model = DistributedDataParallel(saib)
x = given["x"][rank::2]
found = patch_statistics([x], [model(x)], 4)
(found.kl - found.beyond_contrast).backward()
result = {"values": torch.stack(list(found)).detach(),
          "grads": [p.grad for p in saib.parameters()]}
"""


def test_two_processes_are_one(tmp_path) -> None:
    torch.manual_seed(0)
    saib, x = SAIB(16).double(), photographs(12, 16).double()
    with torch.no_grad():
        for p in saib.parameters():
            p.add_(0.05 * torch.randn_like(p))
    found = patch_statistics([x], [saib(x)], 4)
    (found.kl - found.beyond_contrast).backward()
    for result in in_two_processes(WORKER, {"saib": saib.state_dict(), "x": x}, tmp_path):
        torch.testing.assert_close(
            result["values"], torch.stack(list(found)).detach(), rtol=1e-9, atol=1e-9
        )
        for grad, p in zip(result["grads"], saib.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-6, atol=1e-9)


# --- what training on it finds


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_a_linear_map_finds_partial_whitening(ratio: float) -> None:
    """max a Delta H - b KL at the images' own variance: s' = (a + b) / (b / s + m)."""
    n = 12
    spectrum = torch.logspace(0, -2, n)
    spectrum = spectrum / spectrum.mean()
    x = gaussian_patches(400, spectrum)
    patches = patchify(x, 2)
    weight = nn.Parameter(torch.eye(n))
    optimizer = torch.optim.Adam([weight], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        y = torch.einsum("ij,bjhw->bihw", weight, patches)
        y = unpatchify(y * (x.std() / y.std()), 2)  # the contrast held
        found = patch_statistics([x], [y], 2)
        optimizer.zero_grad()
        (ratio * found.kl - found.beyond_contrast).backward()
        optimizer.step()
        schedule.step()
    own = moments(x, 2)[1]
    s, vectors = torch.linalg.eigh(own)
    low, high = 0.0, 1e6
    for _ in range(200):  # m by bisection: the trace falls with m
        m = (low + high) / 2
        expected = (1 + ratio) / (ratio / s + m)
        low, high = (m, high) if expected.sum() > s.sum() else (low, m)
    learned = vectors.T @ moments(y.detach(), 2)[1] @ vectors
    torch.testing.assert_close(learned.diagonal(), expected, rtol=0.03, atol=0)
    off = learned - torch.diag(learned.diagonal())
    assert off.abs().max() < 0.03 * expected.min()
    delta_h = (expected.log() - s.log()).mean() / 2
    assert found.beyond_contrast.item() == pytest.approx(delta_h.item(), rel=0.02)


def test_300_steps_bring_the_papers_saib_to_generation() -> None:
    torch.manual_seed(0)
    saib, images = SAIB(32), photographs(1024)
    optimizer = torch.optim.Adam(saib.parameters(), lr=3e-3)
    for _ in range(300):
        x = images[torch.randint(0, len(images), (48,))]
        found = patch_statistics([x], [saib(x)], saib.patch_size)
        optimizer.zero_grad()
        (found.kl - found.beyond_contrast).backward()
        optimizer.step()
    others = photographs(512, seed=1)
    with torch.no_grad():
        made = saib(others)
        found = patch_statistics([others], [made], saib.patch_size)
    assert found.kl <= 0.15 and found.beyond_contrast >= 0.15
    assert made.std() / others.std() == pytest.approx(1, abs=0.01)
    split = delta_h_split(saib.eval(), others[:4], probes=4, steps=30)
    assert split.nats_per_dimension - found.contrast.item() >= 0.1


# --- log|det J| with a gradient


def small(kind: type, scale: float, **options) -> nn.Module:
    torch.manual_seed(0)
    saib = kind(4, patch_size=2, channels=1, **options).double()
    with torch.no_grad():
        for p in saib.parameters():
            p.add_(scale * torch.randn_like(p))
    return saib.eval()


def exact_gradient(saib: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    """log|det J| of one image and its gradient, by the whole Jacobian."""
    jacobian = torch.func.jacrev(lambda v: saib(v.view_as(x)).reshape(-1))(x.reshape(-1))
    value = torch.linalg.slogdet(jacobian).logabsdet
    return value.item(), flat_gradient(saib, value)


def flat_gradient(saib: nn.Module, value: Tensor) -> Tensor:
    parameters = [p for p in saib.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", [SAIB, ConvexSAIB, NoiseSAIB])
def test_log_det_has_the_exact_gradient(kind: type) -> None:
    """Over all probes of a basis the mean is the trace itself, so only the solve can be wrong."""
    options = {"budget": 0.3} if kind is NoiseSAIB else {"match_statistics": False}
    saib = small(kind, 0.2, **options)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    value, gradient = exact_gradient(saib, x)
    basis = math.sqrt(16) * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    found = log_det(saib.realize(x), x.expand(16, -1, -1, -1), steps=16, probe=basis).mean()
    assert found.item() == pytest.approx(value, abs=1e-6)
    assert value == pytest.approx(logabsdet_exact(saib.realize(x), x).item(), abs=1e-9)
    torch.testing.assert_close(flat_gradient(saib, found), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [2, 4, 8, 12])
def test_the_bias_of_few_steps_is_within_its_bound(steps: int) -> None:
    saib = small(SAIB, 0.15, match_statistics=False)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    _, gradient = exact_gradient(saib, x)
    jacobian = torch.func.jacrev(lambda v: saib(v.view_as(x)).reshape(-1))(x.reshape(-1))
    singular = torch.linalg.svdvals(jacobian)
    k = (singular[0] / singular[-1]).item()
    basis = math.sqrt(16) * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    found = log_det(saib, x.expand(16, -1, -1, -1), steps=steps, probe=basis).mean()
    error = (flat_gradient(saib, found) - gradient).norm() / gradient.norm()
    bound = 2 * ((k - 1) / (k + 1)) ** steps
    assert 2 < k < 10
    assert error < bound


def test_log_det_is_unbiased_over_its_probes() -> None:
    saib = small(SAIB, 0.15, match_statistics=True)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    value, gradient = exact_gradient(saib, x)
    generator = torch.Generator().manual_seed(0)
    many = x.expand(4000, -1, -1, -1)
    values = log_det(saib, many, steps=16, generator=generator)
    stderr = values.std().item() / math.sqrt(4000)
    assert values.mean().item() == pytest.approx(value, abs=4 * stderr)
    found = flat_gradient(saib, values.mean())
    assert (found - gradient).norm() < 0.05 * gradient.norm()


def test_log_det_agrees_with_lanczos_on_images_and_trains() -> None:
    torch.manual_seed(0)
    saib, images = SAIB(32), photographs(256)
    optimizer = torch.optim.Adam(saib.parameters(), lr=1e-2)
    stream = torch.Generator().manual_seed(0)
    for _ in range(60):
        x = images[torch.randint(0, len(images), (32,))]
        found = patch_statistics([x], [saib(x)], 4)
        gained = log_det(saib, x[:8], generator=stream).mean() / x[0].numel() - found.contrast
        optimizer.zero_grad()
        (found.kl - gained).backward()
        optimizer.step()
    saib.eval()
    others = photographs(8, seed=1)
    split = delta_h_split(saib, others, probes=4, steps=30)
    assert split.nats_per_dimension > 0.05
    with torch.no_grad():
        values = log_det(saib, others.repeat(4, 1, 1, 1), generator=stream) / others[0].numel()
    assert values.mean().item() == pytest.approx(split.nats_per_dimension, abs=0.02)


def test_log_det_of_a_singular_map_is_far_below_any_other() -> None:
    scales = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    assert log_det(lambda x: scales * x, torch.randn(1, 8)).item() < -100


def test_log_det_at_the_identity_and_of_what_diverged() -> None:
    x = photographs(2)
    saib = SAIB(32, match_statistics=False)
    value = log_det(saib, x)
    assert value.tolist() == [0.0, 0.0]
    value.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in saib.parameters())
    with torch.no_grad():
        next(saib.parameters()).fill_(math.nan)
        assert log_det(saib, x).isnan().all()


# --- entropy of a view given its image


def test_conditional_entropy_of_a_linear_map_is_the_gaussians() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(48, 10, dtype=torch.float64)
    x, noise = torch.zeros(2, 3, 4, 4).double(), torch.randn(2, 10).double()
    found = conditional_entropy(lambda x, e: x + (e @ mixing.T).view_as(x), x, noise)
    normal = torch.distributions.MultivariateNormal(torch.zeros(10).double(), mixing.T @ mixing)
    torch.testing.assert_close(found, normal.entropy().expand(2))


def test_conditional_entropy_of_a_saib_by_the_whole_jacobian() -> None:
    torch.manual_seed(0)
    saib = NoiseSAIB(8, noise_channels=3, budget=0.3).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    noise = saib.draw(x)
    found = conditional_entropy(saib, x, noise, chunk_size=5)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda e, i=i: saib(x[i : i + 1], e).flatten(), noise[i : i + 1]
        ).flatten(1)
        volume = torch.linalg.svdvals(jacobian).log().sum()
        expected = 6 * math.log(2 * math.pi * math.e) + volume  # 12 dimensions
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-8)
    # it grows with the budget by its logarithm, as the bound does
    with torch.no_grad():
        saib.log_budget.add_(1.0)
    more = conditional_entropy(saib, x, noise)
    torch.testing.assert_close(more, found + 12)
    assert conditional_entropy_bound(0.3 * math.e) - conditional_entropy_bound(0.3) == (
        pytest.approx(1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_full_rank_there_is_no_entropy(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 3, 4, 4, dtype=dtype)
    noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = conditional_entropy(lambda x, e: x + e.sum() * torch.ones_like(x), x, noise)
    assert flat.item() == -math.inf
    for channels, seed in ((12, 0), (12, 1), (12, 2), (16, 0)):  # as many as the view has, and more
        torch.manual_seed(seed)
        saib = NoiseSAIB(8, patch_size=2, noise_channels=channels).to(dtype)
        views = torch.randn(1, 3, 8, 8, dtype=dtype)
        assert conditional_entropy(saib, views, saib.draw(views)).item() == -math.inf
    laplace = torch.distributions.Laplace(0.0, 0.15)
    assert conditional_entropy_bound(0.15) == pytest.approx(laplace.entropy().item())
