"""Spectral contrastive and MINC: values, gradients, cost, and what they recover."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import in_two_processes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from iecl_solo.entropy import effective_rank
from iecl_solo.errors import IECLError
from iecl_solo.losses import MINCLoss, spectral_contrastive_loss
from iecl_solo.losses.climb import VMFMixture, entropy_bound
from iecl_solo.losses.features import scale_features
from iecl_solo.losses.minc import cosine_decay

SHAPES = [(8, 3), (4, 16), (2, 5)]  # the last two have d > B
MUS = [math.inf, 2.0]


def views(batch: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two views' features (B, d), correlated, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shared, *noise = torch.randn(3, batch, dim, generator=generator, dtype=torch.float64)
    return [(shared + 0.5 * n).to(dtype).requires_grad_() for n in noise]


# --- values


def slow_spectral(z1: Tensor, z2: Tensor, pairs: str, include_diagonal: bool) -> float:
    """Every pair by name: (image, view) with (image, view)."""
    rows = {(i, v): z for v, view in enumerate((z1, z2)) for i, z in enumerate(view)}
    squares = [
        float(rows[x] @ rows[y]) ** 2
        for x in rows
        for y in rows
        if (pairs == "all" or (x[1], y[1]) == (0, 1)) and (include_diagonal or x[0] != y[0])
    ]
    positive = [float(a @ b) for a, b in zip(z1, z2, strict=True)]
    return sum(squares) / len(squares) - 2 * sum(positive) / len(positive)


@pytest.mark.parametrize("include_diagonal", [False, True])
@pytest.mark.parametrize("pairs", ["cross", "all"])
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
def test_spectral_is_the_sum_over_its_pairs(
    batch: int, dim: int, pairs: str, include_diagonal: bool
):
    z1, z2 = views(batch, dim)
    value = spectral_contrastive_loss(z1, z2, pairs=pairs, include_diagonal=include_diagonal)
    expected = slow_spectral(z1, z2, pairs, include_diagonal)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pairs", ["cross", "all"])
def test_without_the_diagonal_spectral_is_unbiased(pairs: str):
    """Over every way to draw two of three images its mean is the loss over independent images."""
    z1, z2 = views(3, 4)
    drawn = [
        spectral_contrastive_loss(z1[[i, j]], z2[[i, j]], pairs=pairs)
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    whole = spectral_contrastive_loss(z1, z2, pairs=pairs)
    torch.testing.assert_close(torch.stack(drawn).mean(), whole)


def test_minc_is_its_formula():
    query, target = views(6, 4)
    loss = MINCLoss(4, base_decay=0.0).double()
    moment = sum(torch.outer(q, q) for q in query) / 6
    expected = sum(-2 * q @ t + q @ moment @ q for q, t in zip(query, target, strict=True)) / 6
    torch.testing.assert_close(loss(query, target), expected)


def test_scaling_draws_back_what_is_too_long():
    z = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    norms, scaled = z.norm(dim=1), scale_features(z, 4.0)
    torch.testing.assert_close(scaled.norm(dim=1), norms.clamp(max=2.0))
    assert torch.equal(scaled[norms <= 2], z[norms <= 2])
    assert 5 < int((norms <= 2).sum()) < 45
    assert scale_features(z, math.inf) is z


# --- gradients


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
def test_with_its_own_lambda_minc_has_half_of_spectrals_gradient(batch: int, dim: int, mu: float):
    z1, z2 = views(batch, dim)
    spectral = spectral_contrastive_loss(z1, z2, pairs="all", include_diagonal=True, mu=mu)
    minc = MINCLoss(dim, base_decay=0.0, mu=mu).double()(torch.cat([z1, z2]), torch.cat([z2, z1]))
    whole = torch.autograd.grad(spectral, [z1, z2])
    half = torch.autograd.grad(minc, [z1, z2])
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(b, a / 2, rtol=1e-12, atol=1e-13)
        assert b.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("pairs", "include_diagonal"), [("cross", False), ("cross", True), ("all", False)]
)
def test_the_identity_is_of_those_pairs_alone(pairs: str, include_diagonal: bool):
    z1, z2 = views(4, 3)
    spectral = spectral_contrastive_loss(z1, z2, pairs=pairs, include_diagonal=include_diagonal)
    minc = MINCLoss(3, base_decay=0.0).double()(torch.cat([z1, z2]), torch.cat([z2, z1]))
    whole, half = (torch.autograd.grad(loss, z1)[0] for loss in (spectral, minc))
    assert (half - whole / 2).abs().max() > 1e-2


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("pairs", ["cross", "all"])
def test_spectral_gradcheck(pairs: str, mu: float):
    z1, z2 = views(3, 4)
    assert torch.autograd.gradcheck(
        lambda a, b: spectral_contrastive_loss(a, b, pairs=pairs, mu=mu), (z1, z2)
    )


@pytest.mark.parametrize("mu", MUS)
def test_minc_gradcheck_with_lambda_held(mu: float):
    query, target = views(3, 4)
    loss = MINCLoss(4, mu=mu).double()
    loss(query, target)
    loss.eval()
    assert torch.autograd.gradcheck(lambda q: loss(q, target), (query,))


def test_two_dtypes_are_taken_as_the_wider():
    z1, z2 = views(6, 4)
    for loss in (spectral_contrastive_loss, MINCLoss(4)):
        value = loss(z1.float(), z2)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, loss(z1, z2), rtol=1e-5, atol=1e-6)


def test_minc_stops_the_gradient_in_target_and_lambda():
    query, target = views(5, 3)
    loss = MINCLoss(3, base_decay=0.0).double()
    (by_query,) = torch.autograd.grad(loss(query, target), query)
    torch.testing.assert_close(by_query, 2 / 5 * (query @ loss.second_moment - target))
    assert torch.autograd.grad(loss(query, target), target, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_lifted(dtype: torch.dtype):
    z1, z2 = (z.detach().to(dtype) for z in views(16, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectral = spectral_contrastive_loss(z1, z2)
        minc = MINCLoss(8)(z1, z2)
    assert spectral.dtype == minc.dtype == torch.float32
    exact = [z.double() for z in (z1, z2)]
    torch.testing.assert_close(
        spectral.double(), spectral_contrastive_loss(*exact), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(minc.double(), MINCLoss(8).double()(*exact), rtol=1e-5, atol=1e-5)


# --- Lambda


def slow_moment(batches: list[Tensor], decays: list[float]) -> Tensor:
    """The weighted mean of all batches' moments, each weight written out."""
    weights = [(1 - decay) * math.prod(decays[step + 1 :]) for step, decay in enumerate(decays)]
    moments = [sum(torch.outer(z, z) for z in batch) / len(batch) for batch in batches]
    return sum(w * m for w, m in zip(weights, moments, strict=True)) / sum(weights)


@pytest.mark.parametrize(("base", "final"), [(0.9, None), (0.5, 0.99), (0.9, 0.2), (0.0, None)])
def test_moving_lambda_is_the_weighted_mean_of_all_batches(base: float, final: float | None):
    loss = MINCLoss(4, base_decay=base, final_decay=final).double()
    batches = [views(5, 4, seed)[0].detach() for seed in range(8)]
    decays = []
    for step, batch in enumerate(batches):
        loss(batch, batch, step / 8)
        decays.append(cosine_decay(base, base if final is None else final, step / 8))
        torch.testing.assert_close(loss.second_moment, slow_moment(batches[: step + 1], decays))


def test_bias_correction_makes_the_first_lambda_the_first_batchs():
    z = views(5, 4)[0].detach()
    loss = MINCLoss(4, base_decay=0.999).double()
    loss(z, z)
    torch.testing.assert_close(loss.second_moment, z.T @ z / 5)


def test_schedule_is_a_monotone_half_cosine_that_stays_at_its_end():
    values = [cosine_decay(0.9, 0.99, t / 20) for t in range(21)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (pytest.approx(0.9), pytest.approx(0.99))
    assert cosine_decay(0.9, 0.99, 1.7) == pytest.approx(0.99)


def test_lambda_goes_with_the_state_dict():
    z = views(5, 4, dtype=torch.float32)[0].detach()
    loss, resumed = MINCLoss(4), MINCLoss(4)
    for step in range(3):
        loss(z + step, z, step / 4)
    assert set(loss.state_dict()) == {"moving_moment", "moving_weight"}
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(z, z, 0.75), loss(z, z, 0.75))
    assert torch.equal(resumed.second_moment, loss.second_moment)


def test_evaluation_leaves_lambda_alone():
    z = views(5, 4, dtype=torch.float32)[0].detach()
    loss = MINCLoss(4)
    loss(z, z)
    before = loss.second_moment.clone()
    loss.eval()(3 * z, z)
    assert torch.equal(loss.second_moment, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_overflowed_does_not_stay_in_lambda(bad: float):
    z = views(5, 4, dtype=torch.float32)[0].detach()
    loss, reference = MINCLoss(4), MINCLoss(4)
    spoilt = z.clone()
    spoilt[2, 1] = bad
    for batch in (z, spoilt, 2 * z):
        value = loss(batch, batch)
        assert value.isfinite() == batch.isfinite().all()
    for batch in (z, 2 * z):
        reference(batch, batch)
    assert torch.equal(loss.second_moment, reference.second_moment)


# --- cost, in elements and operations and not in seconds


class Elements(TorchDispatchMode):
    """Counts the elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return out


def cost(loss: Callable[[Tensor, Tensor], Tensor], batch: int) -> tuple[int, int, int]:
    """Largest tensor, elements in all, and multiplications of one value and gradient."""
    z1, z2 = views(batch, 16, dtype=torch.float32)
    with Elements() as elements, FlopCounterMode(display=False) as flops:
        loss(z1, z2).backward()
    return elements.largest, elements.total, flops.get_total_flops()


def test_minc_is_linear_in_the_batch():
    small, double, fourfold = (cost(MINCLoss(16), batch) for batch in (256, 512, 1024))
    for a, b, c in zip(small, double, fourfold, strict=True):
        assert c - b == 2 * (b - a) > 0  # a straight line
    assert fourfold[0] == 1024 * 16


@pytest.mark.parametrize("pairs", ["cross", "all"])
def test_spectral_takes_what_is_smaller_pairs_or_moments(pairs: str):
    def loss(a: Tensor, b: Tensor) -> Tensor:
        return spectral_contrastive_loss(a, b, pairs=pairs)

    few = [cost(loss, batch)[0] for batch in (4, 8, 15)]  # below 2 d no more than the features
    assert max(few) <= 4 * 15 * 16
    small, double, fourfold = (cost(loss, batch) for batch in (256, 512, 1024))
    for a, b, c in zip(small, double, fourfold, strict=True):
        assert c - b == 2 * (b - a) > 0  # a straight line
    assert fourfold[0] <= 2 * 1024 * 16


@pytest.mark.parametrize("include_diagonal", [False, True])
@pytest.mark.parametrize("pairs", ["cross", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_by_moments_is_spectral_by_pairs(pairs: str, include_diagonal: bool, dtype):
    z1, z2 = views(90, 7, dtype=dtype)
    rows, columns = (z1, z2) if pairs == "cross" else [torch.cat([z1, z2])] * 2
    products = (rows @ columns.T).square()
    if not include_diagonal:
        same = torch.arange(len(rows)) % 90
        products = products[same[:, None] != same]
    expected = products.mean() - 2 * (z1 * z2).sum(1).mean()
    found = spectral_contrastive_loss(z1, z2, pairs=pairs, include_diagonal=include_diagonal)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, [z1, z2]) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["spectral", "minc", "climb"])
def test_the_backward_pass_is_in_full_precision_too(name: str):
    z1, z2 = views(64, 32, dtype=torch.float32)
    torch.manual_seed(0)
    mixture = VMFMixture(32, 8)
    loss = {
        "spectral": spectral_contrastive_loss,
        "minc": MINCLoss(32).eval(),
        "climb": lambda a, _: entropy_bound(a, mixture),
    }[name]
    if name == "minc":
        loss.moving_moment.copy_(z2.detach().T @ z2.detach() / 64)
        loss.moving_weight.fill_(1)
    parameters = [z1] + list(mixture.parameters()) * (name == "climb")
    plain = torch.autograd.grad(loss(z1, z2), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss(z1, z2), parameters)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


# --- data whose structure is known: an augmentation kernel with blocks


class Kernel:
    """Images in blocks, each with a law over views: p(x, x') = mean over images of a(x) a(x').

    Its spectral embedding is known: the top eigenvectors of D^-1/2 p D^-1/2.
    """

    def __init__(self, blocks: int = 6, images: int = 48, points: int = 96) -> None:
        self.generator = torch.Generator().manual_seed(0)
        block = (torch.arange(images)[:, None] - torch.arange(points)) % blocks == 0
        law = torch.rand(images, points, generator=self.generator) * (block + 0.02)
        self.law = (law / law.sum(1, keepdim=True)).double()
        joint = self.law.T @ self.law / images
        self.marginal = joint.sum(0)
        normalized = joint / (self.marginal[:, None] * self.marginal).sqrt()
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(normalized)

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """B images, two views of each, as indices of points."""
        images = torch.randint(len(self.law), (batch,), generator=self.generator)
        both = torch.multinomial(self.law[images], 2, replacement=True, generator=self.generator)
        return both[:, 0], both[:, 1]

    def optimum(self, dim: int) -> Tensor:
        """The features (points, d) that minimise L_SC."""
        top = self.eigenvectors[:, -dim:] * self.eigenvalues[-dim:].clamp(min=0).sqrt()
        return top / self.marginal.sqrt()[:, None]

    def smallest_cosine(self, features: Tensor) -> float:
        """Cosine of the largest principal angle between features and the top eigenvectors."""
        basis, _ = torch.linalg.qr(self.marginal.sqrt()[:, None] * features)
        top = self.eigenvectors[:, -features.shape[1] :]
        return float(torch.linalg.svdvals(basis.T @ top).min())


Step = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def trained(kernel: Kernel, loss: Step, dim: int, steps: int = 1500, lr: float = 4.0) -> Tensor:
    """Free features of every point, by SGD on small batches against their moving average."""
    start = torch.randn(len(kernel.marginal), dim, generator=kernel.generator).double()
    features = (0.3 * start).requires_grad_()
    target = features.detach().clone()
    optimizer = torch.optim.SGD([features], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x, y = kernel.sample(64)
        optimizer.zero_grad()
        loss(features[x], features[y], target[x], target[y], step / steps).backward()
        optimizer.step()
        target.lerp_(features.detach(), 0.1)
    return features.detach()


def spectral_step(a: Tensor, b: Tensor, *_: object) -> Tensor:
    return spectral_contrastive_loss(a, b) / 2


def minc_step(dim: int, **options: float) -> Step:
    loss = MINCLoss(dim, base_decay=0.9, final_decay=0.99, **options).double()

    def step(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, progress: float) -> Tensor:
        return loss(torch.cat([a, b]), torch.cat([tb, ta]), progress)

    return step


@pytest.mark.parametrize("name", ["spectral", "minc"])
def test_recovers_the_top_eigenvectors(name: str):
    kernel, dim = Kernel(), 6
    assert kernel.eigenvalues[-dim] > 2 * kernel.eigenvalues[-dim - 1]  # there is something to find
    features = trained(kernel, spectral_step if name == "spectral" else minc_step(dim), dim)
    assert kernel.smallest_cosine(features) > 0.97
    # and their scale: the minimiser's Gram matrix is the kernel's best of this rank
    best = kernel.optimum(dim)
    gram, best_gram = features @ features.T, best @ best.T
    assert (gram - best_gram).norm() < 0.25 * best_gram.norm()
    start = torch.randn(best.shape, generator=torch.Generator().manual_seed(5)).double()
    assert kernel.smallest_cosine(start) < 0.3


def test_without_the_lambda_term_it_collapses_and_with_it_not():
    kernel, dim, mu = Kernel(), 6, 1.0

    def attraction(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, _: float) -> Tensor:
        query, target = (scale_features(torch.cat(z), mu) for z in ((a, b), (tb, ta)))
        return -2 * (query * target).sum(1).mean()

    collapsed = trained(kernel, attraction, dim)
    kept = trained(kernel, minc_step(dim, mu=mu), dim)
    # RankMe counts a constant as one direction
    assert effective_rank(scale_features(collapsed, mu)) < 1.2
    assert effective_rank(scale_features(kept, mu)) > 4.5


# --- variance of the gradient


def gradient_variance(kernel: Kernel, name: str, batch: int, features: Tensor) -> float:
    """Trace of the covariance of the gradient in the features, over batches."""
    step = spectral_step if name == "spectral" else minc_step(features.shape[1])
    for _ in range(100):  # Lambda forgets how it began
        x, y = kernel.sample(batch)
        step(features[x], features[y], features[x], features[y], 1.0)
    gradients = []
    for _ in range(200):
        x, y = kernel.sample(batch)
        z = features.clone().requires_grad_()
        value = step(z[x], z[y], features[x], features[y], 1.0)
        gradients.append(torch.autograd.grad(value, z)[0].flatten())
    return float(torch.stack(gradients).var(0).sum())


@pytest.mark.parametrize("where", ["start", "optimum"])
def test_mincs_gradient_varies_less_the_more_the_smaller_the_batch(where: str):
    kernel, dim = Kernel(), 12
    features = kernel.optimum(dim)
    if where == "start":
        features = torch.randn(features.shape, generator=kernel.generator).double()
    ratios = [
        gradient_variance(kernel, "minc", batch, features)
        / gradient_variance(kernel, "spectral", batch, features)
        for batch in (4, 16, 128)
    ]
    assert ratios == sorted(ratios)
    assert ratios[0] < 0.4 and ratios[1] < 0.7 and ratios[2] < 0.95


# --- two processes

WORKER = """
from iecl_solo.losses import MINCLoss, spectral_contrastive_loss
linear = torch.nn.Linear(5, 4).double()
linear.load_state_dict(given["linear"])
minc = MINCLoss(4, base_decay=0.5).double()
losses = {"minc": lambda a, b: minc(torch.cat([a, b]), torch.cat([b, a])),
          "cross": spectral_contrastive_loss,
          "all": lambda a, b: spectral_contrastive_loss(a, b, pairs="all", include_diagonal=True)}
model, result = DistributedDataParallel(linear), {}
for name, loss in losses.items():
    for step in range(2):
        model.zero_grad()
        a, b = model(given["x"][step].chunk(2, dim=1)[rank].flatten(0, 1)).chunk(2)
        value = loss(a, b)
        value.backward()
    result[name] = value.detach(), [p.grad.clone() for p in linear.parameters()]
result["moment"] = minc.second_moment
"""


def test_two_processes_are_one(tmp_path):
    torch.manual_seed(0)
    # (step, view, image, feature)
    linear, x = torch.nn.Linear(5, 4).double(), torch.randn(2, 2, 12, 5, dtype=torch.float64)
    found = in_two_processes(WORKER, {"linear": linear.state_dict(), "x": x}, tmp_path)
    minc = MINCLoss(4, base_decay=0.5).double()
    losses = {
        "minc": lambda a, b: minc(torch.cat([a, b]), torch.cat([b, a])),
        "cross": spectral_contrastive_loss,
        "all": lambda a, b: spectral_contrastive_loss(a, b, pairs="all", include_diagonal=True),
    }
    for name, loss in losses.items():
        for step in range(2):
            linear.zero_grad()
            value = loss(*linear(x[step].flatten(0, 1)).chunk(2))
            value.backward()
        mean = torch.stack([results[name][0] for results in found]).mean()
        torch.testing.assert_close(mean, value.detach())
        for results in found:
            for got, p in zip(results[name][1], linear.parameters(), strict=True):
                torch.testing.assert_close(got, p.grad)
        assert max(p.grad.abs().max() for p in linear.parameters()) > 1e-3
    for results in found:
        torch.testing.assert_close(results["moment"], minc.second_moment)


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: spectral_contrastive_loss(z, z, pairs="al"), "did you mean 'all'"),
        (lambda z: spectral_contrastive_loss(z, z, mu=0.0), "mu: 0.0"),
        (lambda z: spectral_contrastive_loss(z, z[:2]), r"shapes \(3, 4\) and \(2, 4\)"),
        (lambda z: spectral_contrastive_loss(z[:1], z[:1]), "at least 2"),
        (lambda z: spectral_contrastive_loss(z[0], z[0]), r"shape \(4,\)"),
        (lambda z: spectral_contrastive_loss(z.int(), z.int()), "int32"),
        (lambda z: MINCLoss(5)(z, z), "features of 4 dimensions: 5 are needed"),
        (lambda z: MINCLoss(0), "dim: 0"),
        (lambda z: MINCLoss(4, base_decay=1.0), "base_decay: 1.0"),
        (lambda z: MINCLoss(4, final_decay=-0.1), "final_decay: -0.1"),
        (lambda z: MINCLoss(4, mu=math.nan), "mu: nan"),
    ],
)
def test_bad_input_is_refused_in_one_line(call: Callable, message: str):
    with pytest.raises(IECLError, match=message) as error:
        call(torch.ones(3, 4))
    assert "\n" not in str(error.value)
