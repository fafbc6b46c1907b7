"""CLIMB: its densities against scipy and closed forms, its bound, its objective on every host
method, and what comes of it with IE-CL."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from scipy import integrate, special
from scipy.stats import vonmises_fisher
from support import (
    HOST,
    METHOD_KWARGS,
    assert_resumes,
    batches,
    build,
    config,
    in_two_processes,
    online,
    raw_config,
    same_tensors,
    train_on,
)
from torch import Tensor, nn

from iecl_solo.cli.main import main as cli
from iecl_solo.entropy import coding_rate, effective_rank, log_vmf_normalizer
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.experiments import compare
from iecl_solo.losses.climb import PrototypeMarginal, VMFMixture, entropy_bound
from iecl_solo.objectives.climb import CLIMB, MARGINALS, CLIMBConfig
from iecl_solo.objectives.protocol import Made, Space, Views, total
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.registry import added_methods, check_method, choose_objectives, split_method
from iecl_solo.train.fit import pretrain

VARIANTS = sorted(m for m in added_methods() if split_method(m)[0] == ["climb"])
NAMED = [m for m in ("simclr", "mocov2plus", "byol", "simsiam", "dino") if m in HOST.methods]
OFF = {"beta": 0.0}
IECL_OFF = {"beta": 0.0, "lambda": 0.0, "eta": 0.0, "gamma": 0.0, "placement": "none"}


# the log-normaliser, without mpmath: scipy's own Bessel function where it does not underflow, the
# power series in logarithms where it does

DIMENSIONS = [2, 3, 5, 16, 33, 128, 512, 1000, 2048, 4096]
CONCENTRATIONS = [1e-3, 0.1, 1.0, 7.0, 50.0, 300.0, 2000.0, 1e4]


def log_bessel(order: float, kappa: float) -> float:
    scaled = special.ive(order, kappa)
    if scaled > 1e-250:
        return math.log(scaled) + kappa
    m = np.arange(20000)
    terms = (2 * m + order) * math.log(kappa / 2) - special.gammaln(m + 1)
    return float(special.logsumexp(terms - special.gammaln(m + order + 1)))


@pytest.mark.parametrize("d", DIMENSIONS)
def test_normalizer_against_scipy(d: int):
    order = d / 2 - 1
    for kappa in CONCENTRATIONS:
        truth = order * math.log(kappa) - d / 2 * math.log(2 * math.pi) - log_bessel(order, kappa)
        k = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
        got = log_vmf_normalizer(d, k)
        assert got.item() == pytest.approx(truth, abs=1e-5)
        got.backward()
        ratio = math.exp(log_bessel(order + 1, kappa) - log_bessel(order, kappa))
        assert -k.grad.item() == pytest.approx(ratio, rel=1e-5)
        single = log_vmf_normalizer(d, torch.tensor(kappa)).item()
        assert single == pytest.approx(truth, rel=1e-6, abs=1e-5)


# densities


def mixture(dim: int, components: int, kappa: float, seed: int = 0, **options) -> VMFMixture:
    """A mixture of unlike components, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = VMFMixture(dim, components, **options).double()
        with torch.no_grad():
            out.log_concentration.copy_(math.log(kappa) + 0.5 * torch.randn(components))
            out.logits.copy_(torch.randn(components))
    return out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def circle(n: int = 20000) -> Tensor:
    """Points at equal angles: their mean is a quadrature that is exact for smooth functions."""
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], 1)


def log_area(d: int) -> float:
    return math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)


@pytest.mark.parametrize("kappa", [0.01, 5.0, 200.0])
def test_density_integrates_to_one_on_the_circle(kappa: float):
    density = mixture(2, 5, kappa).log_prob(circle()).exp()
    assert density.mean().item() * 2 * math.pi == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("kappa", [0.01, 3.0, 20.0])
def test_density_integrates_to_one_on_the_sphere(kappa: float):
    z = F.normalize(torch.randn(200_000, 3, generator=generator(), dtype=torch.float64))
    density = mixture(3, 4, kappa).log_prob(z).exp() * 4 * math.pi
    error = density.std().item() / math.sqrt(len(z))
    assert abs(density.mean().item() - 1) < 4 * error + 1e-12 and error < 0.02


def log_prob_slowly(m: VMFMixture, z: Tensor) -> list[float]:
    weights = m.logits.exp() / m.logits.exp().sum()
    out = []
    for row in z.tolist():
        row = [x / math.hypot(*row) for x in row]
        density = 0.0
        for w, mean, kappa in zip(weights, m.means.tolist(), m.concentrations, strict=True):
            mean = [x / math.hypot(*mean) for x in mean]
            order, k = m.dim / 2 - 1, kappa.item()
            constant = k**order / ((2 * math.pi) ** (order + 1) * special.iv(order, k))
            cosine = sum(a * b for a, b in zip(mean, row, strict=True))
            density += w.item() * constant * math.exp(k * cosine)
        out.append(math.log(density))
    return out


@pytest.mark.parametrize("d", [2, 3, 10])
def test_density_against_loops(d: int):
    m, z = mixture(d, 4, 6.0), 3 * torch.randn(7, d, generator=generator(), dtype=torch.float64)
    assert m.log_prob(z).tolist() == pytest.approx(log_prob_slowly(m, z), abs=1e-7)
    single = m.float().log_prob(z.float())
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(log_prob_slowly(m.double(), z), abs=1e-4)


def test_half_precision_is_lifted():
    m, z = mixture(64, 8, 500.0).float(), F.normalize(torch.randn(9, 64, generator=generator()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m.log_prob(z.bfloat16())
        fit = m.fitting_loss(z.bfloat16())
    assert out.dtype == fit.dtype == torch.float32
    torch.testing.assert_close(out, m.log_prob(z.bfloat16().float()))


@pytest.mark.parametrize("d", [2, 8])
def test_gradients_of_the_density(d: int):
    m, z = mixture(d, 3, 4.0), torch.randn(5, d, generator=generator(), dtype=torch.float64)

    def log_prob(z: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(m.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(m, named, z)

    inputs = [t.detach().requires_grad_() for t in (z, *m.parameters())]
    assert torch.autograd.gradcheck(log_prob, inputs)


# the bound


def drawn(mixture: VMFMixture, n: int, seed: int = 0) -> Tensor:
    """Rows of the law by scipy, (n, d) in float64."""
    random = np.random.default_rng(seed)
    weights = mixture.logits.detach().double().softmax(0).numpy()
    means = F.normalize(mixture.means.detach().double(), dim=1).numpy()
    concentrations = mixture.concentrations.tolist()
    counts = random.multinomial(n, weights / weights.sum())
    laws = [vonmises_fisher(m, k) for m, k in zip(means, concentrations, strict=True)]
    rows = [law.rvs(c, random) for law, c in zip(laws, counts, strict=True) if c]
    return torch.from_numpy(random.permutation(np.concatenate(rows)))


@pytest.mark.parametrize("seed", range(5))
def test_bound_is_never_below_the_entropy_of_the_uniform_law(seed: int):
    for kappa in (0.01, 1.0, 20.0):
        r = mixture(2, 4, kappa, seed)
        assert entropy_bound(circle(), r).item() >= math.log(2 * math.pi) - 1e-9
    flat = mixture(16, 4, 1e-8, seed)
    z = torch.randn(50, 16, generator=generator(seed), dtype=torch.float64)
    assert entropy_bound(z, flat).item() == pytest.approx(log_area(16), abs=1e-5)


def vmf_entropy(d: int, kappa: float) -> float:
    k = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
    log_c = log_vmf_normalizer(d, k)
    (minus_length,) = torch.autograd.grad(log_c, k)
    return (-log_c + k * minus_length).item()


def test_bound_is_never_below_the_entropy_of_a_vmf_law():
    p = mixture(2, 1, 5.0)
    density = p.log_prob(circle()).exp().detach() * 2 * math.pi
    truth = vmf_entropy(2, p.concentrations.item())

    def bound(r: VMFMixture) -> float:  # the expectation under p, not a mean over draws
        return -(density * r.log_prob(circle())).mean().item()

    assert bound(p) == pytest.approx(truth, abs=1e-8)
    assert all(bound(mixture(2, 3, k, s)) > truth for k in (0.1, 5.0, 40.0) for s in range(5))


@pytest.mark.parametrize(("d", "kappa"), [(8, 20.0), (128, 400.0), (256, 800.0)])
def test_bound_is_the_entropy_of_a_vmf_law_when_r_is_that_law(d: int, kappa: float):
    p = mixture(d, 1, kappa)
    z = drawn(p, 4000)
    values, truth = -p.log_prob(z), vmf_entropy(d, p.concentrations.item())
    error = values.std().item() / math.sqrt(len(z))
    assert abs(values.mean().item() - truth) < 4 * error
    assert entropy_bound(z, mixture(d, 4, kappa, seed=3)).item() > truth + 4 * error


@pytest.mark.any_host
def test_bound_is_never_below_the_entropy_of_a_mixture():
    p = mixture(2, 4, 8.0, seed=2)

    def minus_p_log_p(angle: float) -> float:
        z = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        log_p = p.log_prob(z).item()
        return -math.exp(log_p) * log_p

    truth, _ = integrate.quad(minus_p_log_p, 0, 2 * math.pi, limit=200)
    density = p.log_prob(circle()).exp().detach() * 2 * math.pi

    def bound(r: VMFMixture) -> float:
        return -(density * r.log_prob(circle())).mean().item()

    assert bound(p) == pytest.approx(truth, abs=1e-6)
    assert all(bound(mixture(2, 4, k, s)) > truth for k in (1.0, 8.0) for s in range(3, 8))


def fit(marginal: VMFMixture | PrototypeMarginal, rows: Tensor, steps: int, lr: float = 0.2):
    optimizer = torch.optim.SGD(marginal.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = generator(1)
    for _ in range(steps):
        optimizer.zero_grad()
        marginal.fitting_loss(rows[torch.randint(len(rows), (256,), generator=draw)]).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.any_host
@pytest.mark.parametrize(("d", "kappa"), [(3, 20.0), (32, 100.0), (128, 400.0)])
def test_learned_marginal_reaches_the_entropy_of_a_known_mixture(d: int, kappa: float):
    """One learning rate and 400 batches of 256 for every dimension, begun near uniform."""
    p = mixture(d, 4, kappa)
    train, test = (drawn(p, 20000, s).float() for s in (0, 1))
    truth = entropy_bound(test.double(), p).item()
    torch.manual_seed(0)
    r = VMFMixture(d, 32)
    before = entropy_bound(test, r).item()
    fit(r, train, 400)
    after = entropy_bound(test, r).item()
    assert before > truth + 0.5
    assert truth - 0.05 < after < truth + max(0.05, 0.001 * d)


def test_fitting_follows_the_likelihoods_gradient_block_by_block():
    m, z = mixture(6, 5, 8.0).float(), F.normalize(torch.randn(40, 6, generator=generator()))
    names = dict(m.named_parameters())
    likelihood = torch.autograd.grad(entropy_bound(z, m), list(names.values()))
    loss = m.fitting_loss(z)
    fitting = torch.autograd.grad(loss, list(names.values()))
    assert loss.item() == 0.0
    for name, a, b in zip(names, likelihood, fitting, strict=True):
        if name == "means":
            torch.testing.assert_close(F.normalize(a), F.normalize(b), rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(a.sign(), b.sign()), name
    # K and d do not set the pace
    assert all(g.abs().max() < 2 for g in fitting)


@pytest.mark.any_host
def test_fitting_arrives_where_the_plain_likelihood_is_under_way():
    p = mixture(128, 10, 300.0).float()
    z = drawn(p, 10_000).float()
    truth, excess = entropy_bound(z, p).item(), {}
    for name in ("likelihood", "fitting"):
        torch.manual_seed(0)
        r, draw = VMFMixture(128, 64), generator(1)
        excess["start"] = entropy_bound(z, r).item() - truth
        optimizer = torch.optim.SGD(r.parameters(), lr=0.05, momentum=0.9)
        for _ in range(100):
            rows = z[torch.randint(len(z), (256,), generator=draw)]
            loss = r.fitting_loss(rows) if name == "fitting" else entropy_bound(rows, r) / 128
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        excess[name] = entropy_bound(z, r).item() - truth
    assert excess["fitting"] < 0.02 * excess["start"]
    assert excess["likelihood"] > 0.5 * excess["start"]


@pytest.mark.any_host
def test_limit_of_the_concentration_bounds_what_collapse_gains():
    limit = 50.0
    m = mixture(8, 3, 1e6, max_concentration=limit)
    assert (m.concentrations < limit).all() and (m.concentrations > 0.99 * limit).all()
    collapsed = F.normalize(torch.ones(5, 8, dtype=torch.float64))
    least = -log_vmf_normalizer(8, limit).item() - limit
    r = VMFMixture(8, 1, max_concentration=limit).double()
    fit(r, collapsed, 200)
    assert least < entropy_bound(collapsed, r).item() < least + 1
    m.concentrations.sum().backward()
    assert m.log_concentration.grad.isfinite().all()


def codes_entropy(scores: Tensor, temperature: float) -> float:
    mean = (scores / temperature).softmax(1).mean(0)
    return -(mean * mean.log()).sum().item()


def test_prototype_bound_is_the_entropy_and_the_divergence():
    scores = torch.randn(200, 50, generator=generator(), dtype=torch.float64)
    truth = codes_entropy(scores, 0.3)
    r = PrototypeMarginal(50, temperature=0.3).double()
    assert entropy_bound(scores, r).item() == pytest.approx(math.log(50), abs=1e-12)
    mean = (scores / 0.3).softmax(1).mean(0)
    for seed in range(5):
        with torch.no_grad():
            r.logits.copy_(torch.randn(50, generator=generator(seed)))
        divergence = (mean * (mean.log() - r.logits.log_softmax(0))).sum().item()
        assert entropy_bound(scores, r).item() == pytest.approx(truth + divergence, abs=1e-9)
        assert divergence > 0
    with torch.no_grad():
        r.logits.copy_(mean.log())
    assert entropy_bound(scores, r).item() == pytest.approx(truth, abs=1e-9)
    assert torch.autograd.gradcheck(lambda s: entropy_bound(s, r), scores[:6].requires_grad_())


@pytest.mark.any_host
@pytest.mark.parametrize("prototypes", [16, 4096])
def test_learned_prototype_marginal_reaches_the_entropy(prototypes: int):
    """At one learning rate, be the codes spread over 16 prototypes or 4096, or all on few."""
    popularity = 3 * torch.randn(prototypes, generator=generator())
    scores = popularity + torch.randn(2000, prototypes, generator=generator(1))
    r = PrototypeMarginal(prototypes)
    loss = r.fitting_loss(scores)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, r.logits)[0].abs().max() <= 1
    fit(r, scores, 200)
    excess = entropy_bound(scores, r).item() - codes_entropy(scores, 1.0)
    assert -1e-5 < excess < 0.02


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: VMFMixture(1), "dim: 1 is not allowed, a whole number from 2 up"),
        (lambda: VMFMixture(4, 0), "num_components: 0"),
        (lambda: VMFMixture(4, max_concentration=0), "max_concentration: 0"),
        (lambda: VMFMixture(4).log_prob(torch.randn(3, 5)), "(3, 5): (B, 4) is needed"),
        (lambda: VMFMixture(4).log_prob(torch.ones(3, 4).long()), "int64"),
        (lambda: PrototypeMarginal(1), "num_prototypes: 1"),
        (lambda: PrototypeMarginal(4, temperature=0), "temperature: 0"),
        (lambda: PrototypeMarginal(4).log_prob(torch.randn(3, 5)), "(3, 5): (B, 4) is needed"),
        (lambda: CLIMBConfig(beta=-1), "climb.beta: -1 is not allowed, a number from 0 up"),
        (lambda: CLIMBConfig(num_components=0), "climb.num_components: 0"),
        (lambda: CLIMBConfig(max_concentration=0), "climb.max_concentration: 0"),
        (lambda: CLIMBConfig(marginal="vfm"), "did you mean 'vmf'"),
    ],
)
def test_what_cannot_be_is_refused(call, said: str):
    with pytest.raises(IECLError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)


# the objective, alone


def objective(momentum: bool = False, space: Space | None = None, **options) -> CLIMB:
    views = Views(2, momentum, (0, 1) if momentum else (1,))
    torch.manual_seed(0)
    return CLIMB(CLIMBConfig(**options), 32, views, nn.Identity(), space or Space(16))


def made(dim: int = 16, rows: int = 12) -> Made:
    draw = generator()
    online = {v: torch.randn(rows, dim, generator=draw).requires_grad_() for v in (0, 1)}
    momentum = {v: torch.randn(rows, dim, generator=draw).requires_grad_() for v in (0, 1)}
    return Made(online, momentum)


def test_bound_moves_the_network_and_the_fit_moves_r():
    o, m = objective(beta=0.5), made()
    terms = o.terms(m, 0.0)
    z = [m.online[0], m.online[1]]
    r = list(o.parameters())
    of_bound = torch.autograd.grad(terms["entropy_bound"].value, [*z, *r], allow_unused=True)
    assert all(g.abs().sum() > 0 for g in of_bound[:2]) and of_bound[2:] == (None,) * len(r)
    of_fit = torch.autograd.grad(terms["fit"].value, [*z, *r], allow_unused=True)
    assert of_fit[:2] == (None, None) and all(g.abs().sum() > 0 for g in of_fit[2:])
    assert not terms["coding_rate"].value.requires_grad
    assert not terms["fit"].logged and terms["fit"].value.item() == 0
    # the momentum side has no part in it
    total(o.terms(m, 0.0)).backward()
    assert m.momentum[0].grad is None and m.momentum[1].grad is None


@pytest.mark.parametrize("momentum", [False, True])
def test_z_is_every_online_view_unless_said_otherwise(momentum: bool):
    m = made()
    for given, rows in ((None, [0, 1]), ([0], [0]), ([1, 0], [0, 1])):
        o = objective(momentum, views=given)
        value = o.terms(m, 0.0)["entropy_bound"].value
        z = torch.cat([m.online[v] for v in rows])
        assert value.item() == pytest.approx(entropy_bound(z, o.marginal).item(), rel=1e-6)


def test_beta_ramps_up_and_r_is_learned_meanwhile():
    o = objective(beta=0.5, beta_warmup_epochs=10)
    at = {e: o.terms(made(), e) for e in (0.0, 5.0, 20.0)}
    # of an embedding's 16 dimensions
    assert [16 * t["entropy_bound"].weight for t in at.values()] == [0.0, 0.25, 0.5]
    assert [t["fit"].weight for t in at.values()] == [1.0, 1.0, 1.0]


def test_without_beta_there_is_nothing_to_learn():
    o = objective(beta=0)
    assert list(o.parameters()) == []
    assert total(o.terms(made(), 0.0)) is None


def test_prototypes_where_the_host_has_them():
    space = Space(16, num_prototypes=40, temperature=0.1)
    m = made()
    m = Made(m.online, m.momentum, {v: torch.randn(12, 40) for v in (0, 1)})
    o = objective(space=space)
    assert isinstance(o.marginal, PrototypeMarginal) and o.marginal.temperature == 0.1
    value = o.terms(m, 0.0)["entropy_bound"].value
    assert value.item() == pytest.approx(math.log(40), abs=1e-5)
    assert isinstance(objective(space=space, marginal="vmf").marginal, VMFMixture)
    with pytest.raises(IECLError, match="'prototypes' is for DINO"):
        objective(marginal="prototypes")


@pytest.mark.parametrize("views", [[2], [], [-1]])
def test_views_that_are_not_there_are_refused(views: list[int]):
    with pytest.raises(IECLError, match=r"climb\.views: .* allowed are 0 to 1"):
        objective(views=views)


def train_toy(
    o: CLIMB, learned: nn.ModuleList, data: Tensor, host_loss: Callable, steps: int
) -> None:
    """A host's loss and CLIMB on two noisy views of points; ``learned[0]`` embeds them."""
    parameters = [*learned.parameters(), *o.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(steps):
        x = data[torch.randint(512, (128,))]
        a, b = (learned[0](x + 0.3 * torch.randn_like(x)) for _ in range(2))
        loss = host_loss(a, b)
        added = total(o.terms(Made({0: a, 1: b}), 0.0))
        loss = loss if added is None else loss + added
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def toy(beta: float, steps: int = 120) -> tuple[float, float, float]:
    """SimCLR's loss and CLIMB on noisy views of 512 points: bound, coding rate, effective rank."""
    torch.manual_seed(0)
    data = torch.randn(512, 16)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    o = objective(beta=beta, num_components=16)

    def simclr(a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(128))

    train_toy(o, nn.ModuleList([network]), data, simclr, steps)
    z = F.normalize(network(data), dim=1).detach()
    torch.manual_seed(0)
    r = VMFMixture(16, 16, max_concentration=160)
    fit(r, z, 200)
    return entropy_bound(z, r).item(), coding_rate(z).item(), effective_rank(z).item()


@pytest.mark.any_host
def test_entropy_falls_as_beta_grows():
    results = [toy(beta) for beta in (0.0, 1.0, 10.0, 100.0)]
    bounds, rates, ranks = zip(*results, strict=True)
    assert all(a > b for a, b in pairwise(bounds)), bounds
    assert all(a > b for a, b in pairwise(rates)), rates
    assert bounds[0] - bounds[-1] > 5  # nats: a large beta does collapse what it can
    assert ranks[-1] < 0.7 * ranks[0]
    assert toy(MARGINALS["vmf"])[2] > 0.9 * ranks[0]  # and the default does not


def rank_without_negatives(beta: float | None, steps: int = 600) -> float:
    """Effective rank that SimSiam's loss and CLIMB leave, on the same noisy views."""
    torch.manual_seed(0)
    data = torch.randn(512, 16)
    network = nn.Sequential(
        *(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32))
    )
    predictor = nn.Sequential(
        *(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
    )
    views = Views(2, momentum=False, query=(1,))
    o = CLIMB(CLIMBConfig(beta=beta, num_components=16), 32, views, network, Space(32))

    def simsiam(a: Tensor, b: Tensor) -> Tensor:
        pairs = ((predictor(a), b.detach()), (predictor(b), a.detach()))
        return -sum(F.cosine_similarity(p, z).mean() for p, z in pairs) / 2

    torch.manual_seed(1)  # the same batches, whatever r drew
    train_toy(o, nn.ModuleList([network, predictor]), data, simsiam, steps)
    return effective_rank(F.normalize(network(data), dim=1).detach()).item()


@pytest.mark.any_host
def test_default_beta_does_not_collapse_a_host_without_negatives():
    without = rank_without_negatives(0.0)
    assert rank_without_negatives(None) > 0.9 * without
    assert rank_without_negatives(10 * MARGINALS["vmf"]) < 0.6 * without  # it could


WORKER = """
from torch import nn
from iecl_solo.objectives.climb import CLIMB, CLIMBConfig
from iecl_solo.objectives.protocol import Made, Space, Views, total

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(5, 16)
        views = Views(2, momentum=False, query=(1,))
        config = CLIMBConfig(beta=0.5, num_components=4)
        self.climb = CLIMB(config, 32, views, self.network, Space(16))
    def forward(self, x):
        z = self.network(x)
        return self.climb.terms(Made({0: z, 1: z + 1}), 0.0)

both = Both()
both.load_state_dict(given["both"])
ddp = DistributedDataParallel(both)
terms = ddp(given["x"].chunk(2)[rank])
total(terms).backward()
result = [p.grad for p in both.parameters()], terms["coding_rate"].value
"""


@pytest.mark.any_host
def test_two_processes_give_the_gradient_of_one(tmp_path: Path):
    torch.manual_seed(0)
    climb = objective(beta=0.5, num_components=4)
    both = nn.ModuleDict({"network": nn.Linear(5, 16), "climb": climb})
    x = torch.randn(12, 5)
    z = both["network"](x)
    terms = both["climb"].terms(Made({0: z, 1: z + 1}), 0.0)
    bound = terms["entropy_bound"]
    network = torch.autograd.grad(bound.weight * bound.value, list(both["network"].parameters()))
    fit = torch.autograd.grad(terms["fit"].value, list(both["climb"].parameters()))
    assert all(gradient.abs().max() > 1e-3 for gradient in fit)
    grads = in_two_processes(WORKER, {"both": both.state_dict(), "x": x}, tmp_path)
    for own, _ in grads:  # r is that of all rows, and not a mean of two
        for a, b in zip(own[2:], fit, strict=True):
            torch.testing.assert_close(a, b)
    for (own, rate), (other, _) in (grads, grads[::-1]):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
        for a, b in zip(own[:2], network, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(rate, terms["coding_rate"].value)


PROTOTYPES_WORKER = """
from iecl_solo.losses.climb import PrototypeMarginal
marginal = PrototypeMarginal(4)
ddp = DistributedDataParallel(marginal)
ddp(given[:2])  # what DDP wants before a backward pass
marginal.fitting_loss(given.chunk(2)[rank]).backward()
result = marginal.logits.grad
"""


@pytest.mark.any_host
def test_two_processes_fit_one_prototype_marginal(tmp_path: Path):
    torch.manual_seed(0)
    scores = 3 * torch.randn(12, 4)
    marginal = PrototypeMarginal(4)
    marginal.fitting_loss(scores).backward()
    for gradient in in_two_processes(PROTOTYPES_WORKER, scores, tmp_path):
        torch.testing.assert_close(gradient, marginal.logits.grad)


# on the host's methods


@pytest.mark.parametrize("method", VARIANTS)
def test_trains_two_steps_and_r_moves(method: str, images: Path):
    model = build(method, images)
    before = {k: v.clone() for k, v in model.climb.state_dict().items()}
    weights = {k: v.clone() for k, v in online(model).state_dict().items()}
    logged: dict[str, float] = {}
    log_dict = model.log_dict

    def spy(values, **kwargs):
        logged.update({k: float(v) for k, v in values.items()})
        log_dict(values, **kwargs)

    model.log_dict = spy
    train_on(model, pretrain_loader(config(method, images), HOST), max_steps=2)
    assert same_tensors(before, model.climb.state_dict()), "r was not learned"
    assert same_tensors(weights, online(model).state_dict()), "the network was not trained"
    for term in ("entropy_bound", "coding_rate"):
        assert math.isfinite(logged[f"train_climb_{term}"]), term
    assert "train_climb_fit" not in logged
    assert all(torch.isfinite(p).all() for p in model.parameters())
    prototypes = method == "climb_dino"
    assert isinstance(model.climb.marginal, PrototypeMarginal if prototypes else VMFMixture)


def test_every_method_has_a_variant_and_a_combination():
    bare = {split_method(t)[1] for t in VARIANTS}
    assert set(NAMED) <= bare
    assert {f"iecl_climb_{m}" for m in bare} <= set(HOST.methods)
    assert set(METHOD_KWARGS) & set(HOST.methods) <= bare


@pytest.mark.parametrize("method", NAMED)
def test_variant_without_beta_is_its_host(method: str, images: Path):
    host = train_on(build(method, images), batches(4))
    variant = train_on(build(f"climb_{method}", images, climb=OFF), batches(4))
    assert list(host.state_dict()) == list(variant.state_dict())
    assert same_tensors(host.state_dict(), variant.state_dict()) == []
    both = build(f"iecl_climb_{method}", images, iecl=IECL_OFF, climb=OFF)
    assert same_tensors(host.state_dict(), train_on(both, batches(4)).state_dict()) == []


@pytest.mark.parametrize("method", NAMED)
def test_building_a_variant_draws_no_random_number_of_the_host(method: str, images: Path):
    host, state = build(method, images), torch.get_rng_state()
    variant, state_of_variant = build(f"climb_{method}", images), torch.get_rng_state()
    assert torch.equal(state, state_of_variant)
    assert same_tensors(host.state_dict(), variant.state_dict()) == []


def test_dino_hands_over_its_prototypes(images: Path):
    model = build("climb_dino", images, method_kwargs__student_temperature=0.2)
    assert model.climb.marginal.temperature == 0.2
    assert model.climb.marginal.logits.shape == (32,)
    seen: list[Made] = []
    terms = model.climb.terms

    def spy(made: Made, *args):
        seen.append(made)
        return terms(made, *args)

    model.climb.terms = spy
    head, momentum_head = model.head, model.momentum_head
    train_on(model, batches(1))
    assert {v: tuple(s.shape) for v, s in seen[0].scores.items()} == {0: (8, 32), 1: (8, 32)}
    assert {v: tuple(z.shape) for v, z in seen[0].online.items()} == {0: (8, 16), 1: (8, 16)}
    assert not any(z.requires_grad for z in seen[0].momentum.values())
    assert model.head is head and model.momentum_head is momentum_head
    for v, z in seen[0].online.items():  # what was scored is what was embedded
        assert seen[0].scores[v].abs().max() <= 1.01 and z.requires_grad


def test_momentum_network_has_no_gradient(images: Path):
    model = train_on(build("climb_byol", images, climb={"beta": 1.0}), batches(1))
    assert all(p.grad is None for p in getattr(model, HOST.momentum).parameters())


def test_learning_rate_of_r_is_its_own_and_does_not_depend_on_beta(images: Path):
    model = build("climb_simclr", images, climb={"lr_multiplier": 0.5})
    (group,) = [g for g in model.learnable_params if g.get("name") == "climb"]
    assert group["weight_decay"] == 0.0 and group["lr"] == 0.5 * model.lr
    still = build("climb_simclr", images, scheduler__name="none", climb={"lr_multiplier": 0.0})
    before = {k: v.clone() for k, v in still.climb.state_dict().items()}
    assert same_tensors(before, train_on(still, batches(2)).climb.state_dict()) == []
    first = [
        train_on(build("climb_simclr", images, climb={"beta": b}), batches(1)).climb.state_dict()
        for b in (1e-6, 1.0)
    ]
    assert same_tensors(*first) == []


@pytest.mark.parametrize("method", ["climb_simclr", "climb_dino"])
def test_bfloat16_and_accumulation(method: str, images: Path):
    model = build(method, images, precision="bf16-mixed", accumulate_grad_batches=2)
    train_on(model, batches(4), precision="bf16-mixed", accumulate_grad_batches=2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", ["dino", "climb_dino"])
def test_efficientnet(method: str, images: Path):
    network = {"name": "timm/efficientnet_b0", "kwargs": {"small_stem": True}}
    model = train_on(build(method, images, backbone=network), batches(2))
    assert online(model).conv_stem.stride == (1, 1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", ["climb_simclr", "climb_dino", "iecl_climb_byol"])
def test_resumed_run_is_the_uninterrupted_one(method: str, images: Path, tmp_path: Path):
    assert_resumes(method, images, tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    own = [k for k in state if k.startswith("climb.")]
    # words that the host's own linear evaluation rewrites
    assert own and not any("encoder" in k or "backbone" in k for k in own)


# the commands


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of two objectives at once, chosen by the key."""
    raw = raw_config(
        "dino",
        images,
        data__val_path=str(images),
        max_epochs=1,
        objectives=["climb", "iecl"],
        climb={"beta": 0.01},
        checkpoint__dir=str(tmp_path_factory.mktemp("runs")),
        monitor={"every_n_epochs": 1, "images": 8, "delta_h_images": 1, "probes": 2, "steps": 4},
    )
    return pretrain(OmegaConf.create(raw))


def test_key_chooses_the_objectives(run):
    args = json.loads((run.folder / "args.json").read_text())
    assert args["method"] == "iecl_climb_dino" and "objectives" not in args
    assert args["climb"]["beta"] == 0.01 and args["climb"]["num_components"] == 64
    assert args["iecl"]["placement"] == "query"
    logged = run.result["metrics"]
    for name in ("iecl_entropy", "iecl_kl", "climb_entropy_bound", "climb_coding_rate"):
        assert math.isfinite(logged[f"train_{name}_epoch"]), name
    keys = read_checkpoint(run.checkpoint)["state_dict"]
    assert any(k.startswith("iecl.saib") for k in keys) and "climb.marginal.logits" in keys
    model = load_method(read_pretrained(run.folder), HOST)
    assert list(model.objectives) == ["iecl", "climb"]


def test_finished_run_is_evaluated_and_exported(run, images: Path, tmp_path: Path, capsys):
    folder = str(run.folder)
    assert cli(["knn", "--config-name", "default", f"pretrained_feature_extractor={folder}"]) == 0
    assert "top-1 100.00 %" in capsys.readouterr().out
    linear = [
        *("linear", "--config-name", "digits", f"pretrained_feature_extractor={folder}"),
        *(f"data.train_path={images}", f"data.val_path={images}", "max_epochs=1"),
        *("backbone.name=timm/test_resnet", "~backbone.kwargs", "name=probe"),
    ]
    assert cli(linear) == 0
    assert cli(["export", folder, "--to", str(tmp_path / "backbone.safetensors")]) == 0
    assert cli(["export", folder, "--saib", "--to", str(tmp_path / "saib.safetensors")]) == 0
    assert cli(["inspect", folder, "--images", "8", "--probes", "2"]) == 0


@pytest.mark.parametrize(
    ("method", "objectives", "becomes"),
    [
        ("simclr", ["climb"], "climb_simclr"),
        ("simclr", ["climb", "iecl"], "iecl_climb_simclr"),
        ("iecl_simclr", ["climb"], "climb_simclr"),
        ("iecl_climb_byol", [], "byol"),
        ("climb_byol", None, "climb_byol"),
    ],
)
def test_key_decides_over_the_methods_name(method: str, objectives, becomes: str):
    cfg = OmegaConf.create({"method": method, "iecl": {}, "climb": {}, "objectives": objectives})
    choose_objectives(cfg)
    assert cfg.method == becomes and "objectives" not in cfg
    check_method(cfg.method)
    if objectives is not None:
        assert {"iecl", "climb"} & set(cfg) == set(objectives)


@pytest.mark.parametrize(
    ("objectives", "said"), [(["clim"], "did you mean 'climb'"), ("climb", "a list out of")]
)
def test_unknown_objectives_are_refused(objectives, said: str):
    with pytest.raises(IECLError, match=said):
        choose_objectives(OmegaConf.create({"method": "simclr", "objectives": objectives}))


@pytest.mark.parametrize("method", ["climb_linear", "iecl_climb_linear"])
def test_refused_by_name_with_the_reason(method: str):
    with pytest.raises(IECLError, match="frozen backbone"):
        check_method(method)


def test_compare_takes_the_climb_variant(images: Path, tmp_path: Path, capfd, monkeypatch):
    # in this process: what a process of its own is for, peak memory, is not looked at here
    monkeypatch.setattr(compare, "in_processes", lambda target, *args: target(*args))
    arguments = [
        *("--config-name", "digits/climb_simclr", "accelerator=cpu", "devices=1"),
        *(f"data.train_path={images}", f"data.val_path={images}", "optimizer.batch_size=8"),
        *("backbone.name=timm/test_resnet", "~backbone.kwargs", "max_epochs=1"),
        *("monitor.every_n_epochs=0", f"compare.dir={tmp_path}", "climb.num_components=4"),
    ]
    assert cli(["compare", *arguments, "evaluation.linear.max_epochs=1"]) == 0
    frame = pd.read_csv(tmp_path / "climb/table.csv", index_col="method")
    assert list(frame.index) == ["simclr", "climb_simclr"]
    assert frame["H(Z) nats"].notna().all()
    assert frame["climb_entropy_bound"].isna().tolist() == [True, False]
    assert (tmp_path / "climb/curves.png").is_file()
    printed = capfd.readouterr().out
    assert "climb_simclr is" in printed and "saib.png" not in printed


if (HOST.path.parent / "main_pretrain.py").is_file():

    def test_solo_learns_own_script_trains_the_combination(images: Path, tmp_path: Path):
        script = HOST.path.parent / "main_pretrain.py"
        arguments = [
            *("--config-path", "pkg://iecl_solo.configs"),
            *("--config-name", "pretrain/digits/climb_simclr", "method=iecl_climb_simclr"),
            *("accelerator=cpu", "devices='1'", "precision=32-true", "data.num_workers=0"),
            *(f"data.train_path={images}", f"data.val_path={images}", "max_epochs=1"),
            *("backbone.name=resnet18", "~backbone.kwargs", "optimizer.batch_size=8"),
        ]
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        args = json.loads((checkpoint.parent / "args.json").read_text())
        assert args["climb"]["beta"] == CLIMBConfig().beta and args["iecl"]["placement"] == "query"
        state = read_checkpoint(checkpoint)["state_dict"]
        assert any(k.startswith("iecl.saib") for k in state) and "climb.marginal.means" in state
