"""IE-CL's objective: whom each term trains, where SAIB stands, and how its budget is found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_resumes, batches, build, in_two_processes, same_tensors, train_on
from test_generation import photographs
from torch import Tensor, nn

from iecl_solo.entropy import effective_rank, gaussian_kl
from iecl_solo.errors import IECLError
from iecl_solo.generation import patch_statistics
from iecl_solo.objectives.iecl import IECL, IECLConfig, agreement
from iecl_solo.objectives.protocol import Made, Space, Views, total
from iecl_solo.saib import NoiseSAIB
from iecl_solo.solo.config import parse_block

PAIR = Views(num_views=2, momentum=False, query=(1,))
WITH_MOMENTUM = Views(num_views=2, momentum=True, query=(0, 1))
#: Only the KL; SAIB is there.
KL_ALONE = {"lambda": 0.0, "eta": 0.0, "gamma": 0.0, "generation": {"weight": 0.0}}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 32),
    )


def objective(block: dict[str, Any], views: Views = PAIR, size: int = 32) -> IECL:
    torch.manual_seed(0)
    return IECL(parse_block("iecl", IECLConfig, block), size, views, network(), Space(32))


def moved(iecl: IECL, scale: float = 0.05) -> IECL:
    with torch.no_grad():
        for i, p in enumerate(iecl.saib.parameters()):
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return iecl


def step(iecl: IECL, net: nn.Module, x: Tensor, y: Tensor) -> tuple[Made, Tensor | None]:
    """What the wrapper does in a step: the embeddings, and what is added to the host's loss."""
    iecl.weight_terms(net)
    made = Made({0: net(iecl.transform(x, 0, "online")), 1: net(iecl.transform(y, 1, "online"))})
    return made, total(iecl.terms(made, 0.0))


# --- the KL


@pytest.mark.parametrize("space", ["input", "embedding"])
@pytest.mark.parametrize("host_gradient", ["with", "without"])
def test_the_kl_trains_saib_and_no_weight_of_the_encoder(space: str, host_gradient: str) -> None:
    block = {**KL_ALONE, "kl": {"space": space}, "saib": {"host_gradient": host_gradient}}
    iecl, net, x = moved(objective(block)), network(), photographs(16)
    _, loss = step(iecl, net, x, x.flip(-1))
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    assert all(p.grad is not None and p.grad.any() for p in iecl.saib.parameters())


@pytest.mark.parametrize("host_gradient", ["with", "without", "against"])
def test_the_kl_of_embeddings_has_its_own_gradient(host_gradient: str) -> None:
    saib = {"variant": "noise", "host_gradient": host_gradient}
    iecl = objective({**KL_ALONE, "kl": {"space": "embedding"}, "saib": saib})
    net, x = network().eval(), photographs(16)
    kept = {k: v.clone() for k, v in iecl.saib.state_dict().items()}
    _, loss = step(iecl, net, x, x.flip(-1))
    loss.backward()
    found = [p.grad.clone() for p in iecl.saib.parameters()]
    iecl.saib.load_state_dict(kept)  # the same noise again
    query, anchor = (F.normalize(net(v), dim=-1) for v in (iecl.saib(x.flip(-1)), x))
    expected = torch.autograd.grad(gaussian_kl(query, anchor) / 32, list(iecl.saib.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("space", ["input", "embedding"])
def test_the_kl_of_the_input_is_of_the_views(space: str) -> None:
    iecl, net, x = moved(objective({**KL_ALONE, "kl": {"space": space}})), network(), photographs(8)
    iecl.transform(x, 1, "online")
    made = Made({0: net(x), 1: net(x)})
    terms = iecl.terms(made, 0.0)
    expected = patch_statistics([x], [iecl.saib(x)], 4)
    assert terms["patch_kl"].value.item() == pytest.approx(expected.kl.item(), rel=1e-4)
    assert (terms["patch_kl"].weight, terms["kl"].weight) == ((1.0, 0.0), (0.0, 1.0))[
        space == "embedding"
    ]


def _rank_after(iecl: IECL | None, beta_to_encoder: float = 0.0, steps: int = 80) -> float:
    """Effective rank of the embeddings after training by InfoNCE and what is added to it."""
    torch.manual_seed(0)
    net, images = network(), photographs(512)
    parameters = [*net.parameters(), *(iecl.parameters() if iecl else ())]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for _ in range(steps):
        x = images[torch.randint(0, len(images), (48,))]
        x, y = x + 0.3 * torch.randn_like(x), x.flip(-1)
        if iecl is None:
            made, added = Made({0: net(x), 1: net(y)}), None
        else:
            made, added = step(iecl, net, x, y)
        query, anchor = (F.normalize(made.online[v], dim=-1) for v in (1, 0))
        loss = F.cross_entropy(query @ anchor.T / 0.2, torch.arange(48))
        if beta_to_encoder:
            loss = loss + beta_to_encoder * gaussian_kl(query, anchor)
        optimizer.zero_grad()
        (loss if added is None else loss + added).backward()
        if iecl is not None:
            iecl.before_optimizer_step()
        optimizer.step()
    with torch.no_grad():
        return effective_rank(F.normalize(net.eval()(photographs(256, seed=1)), dim=-1)).item()


@pytest.mark.any_host
def test_embeddings_do_not_collapse_under_the_kl_of_either_space() -> None:
    """What was: the gradient of the KL of embeddings, its anchor detached, in the encoder."""
    without = _rank_after(None)
    assert _rank_after(None, beta_to_encoder=1.0) < without / 2, "the test has lost its point"
    for space in ("input", "embedding"):
        iecl = objective({**KL_ALONE, "beta": 32.0, "kl": {"space": space}})
        assert _rank_after(iecl) > 0.85 * without, space


WORKER = """
import torch.nn.functional as F
from torch import nn
from iecl_solo.objectives.iecl import IECL, IECLConfig
from iecl_solo.objectives.protocol import Made, Space, Views, total
from iecl_solo.solo.config import parse_block
net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(128, 6)).double()
net.load_state_dict(given["net"])
config = parse_block("iecl", IECLConfig, given["block"])
iecl = IECL(config, 16, Views(2, False, (1,)), net, Space(6)).double()
iecl.load_state_dict(given["iecl"])
class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.iecl = net, iecl
    def forward(self, x, y):
        made = {0: self.net(x), 1: self.net(self.iecl.transform(y, 1, "online"))}
        return total(self.iecl.terms(Made(made), 0.0))
both = DistributedDataParallel(Both()) if torch.distributed.get_world_size() > 1 else Both()
both(given["x"][rank::2], given["x"].flip(-1)[rank::2]).backward()
result = {n: p.grad for n, p in both.module.named_parameters() if p.grad is not None}
"""


@pytest.mark.any_host
@pytest.mark.parametrize("space", ["input", "embedding"])
def test_two_processes_give_the_gradient_of_one(space: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = {"eta": 0.0, "gamma": 0.0, "lambda": 0.1, "kl": {"space": space}}
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(128, 6)).double()
    config = parse_block("iecl", IECLConfig, block)
    iecl = moved(IECL(config, 16, PAIR, net, Space(6)).double())
    x = photographs(12, 16).double()
    given = {"net": net.state_dict(), "iecl": iecl.state_dict(), "x": x, "block": block}
    _, loss = step(iecl, net, x, x.flip(-1))
    loss.backward()
    expected = {f"net.{n}": p.grad for n, p in net.named_parameters()}
    expected |= {f"iecl.{n}": p.grad for n, p in iecl.named_parameters()}
    for found in in_two_processes(WORKER, given, tmp_path):
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            # embeddings are compared in float32
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


# --- generation


@pytest.mark.any_host
def test_both_measures_are_logged_in_nats_per_dimension() -> None:
    x, net = photographs(8), network()
    values = {}
    for measure in ("patch", "jacobian"):
        iecl = moved(objective({"generation": {"weight": 0.5, "measure": measure}}), 0.02)
        iecl.transform(x, 1, "online")
        term = iecl.terms(Made({0: net(x), 1: net(x)}), 0.0)["generation"]
        assert term.weight == -0.5 and term.value.requires_grad
        values[measure] = term.value.item()
    expected = patch_statistics([x], [iecl.saib(x)], 4)
    assert values["patch"] == pytest.approx(expected.beyond_contrast.item(), rel=1e-4)
    from iecl_solo.jacobian import delta_h_split

    split = delta_h_split(iecl.saib.eval(), x, probes=8, steps=20)
    exact = split.nats_per_dimension - expected.contrast.item()
    assert values["jacobian"] == pytest.approx(exact, abs=0.02)


@pytest.mark.any_host
@pytest.mark.parametrize("lr", [0.05, 1.0])
def test_saib_is_trained_at_any_rate_of_the_hosts_optimizer(lr: float) -> None:
    """Without the clipping Delta H is -1 to -2 nats per dimension after as many steps."""
    iecl, images = objective({**KL_ALONE, "generation": {"weight": 1.0}}), photographs(512)
    optimizer = torch.optim.SGD(iecl.saib.parameters(), lr=lr, momentum=0.9)
    z = torch.randn(48, 8)
    for _ in range(150):
        x = images[torch.randint(0, len(images), (48,))]
        iecl.transform(x, 1, "online")
        terms = iecl.terms(Made({0: z, 1: z.flip(0)}), 0.0)
        optimizer.zero_grad()
        total(terms).backward()
        iecl.before_optimizer_step()
        optimizer.step()
    assert terms["generation"].value > 0.2
    assert terms["patch_kl"].value < 0.2


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    iecl = objective({})
    for p in iecl.saib.parameters():
        p.grad = torch.full_like(p, math.nan)
    iecl.before_optimizer_step()
    assert all(p.grad.isnan().all() for p in iecl.saib.parameters())


def test_a_step_that_failed_leaves_nothing_for_the_next() -> None:
    iecl, net, x = objective({}), network(), photographs(4)
    iecl.transform(x, 1, "online")  # and the host's step raises
    iecl.weight_terms(net)
    iecl.transform(2 * x, 1, "online")
    iecl.terms(Made({0: net(x), 1: net(x)}), 0.0)
    assert iecl._transformed == []
    with torch.no_grad():
        iecl.eval().transform(x, 1, "online")
    assert iecl._transformed == []


# --- where SAIB stands


def test_anchor_of_a_momentum_network_is_trained_at_the_input_or_refused() -> None:
    iecl, x = moved(objective({"placement": "anchor"}, WITH_MOMENTUM)), photographs(8)
    net = network()
    iecl.weight_terms(net)
    with torch.no_grad():
        anchor = net(iecl.transform(x, 0, "momentum"))
    assert not torch.equal(anchor, net(x)) and not anchor.requires_grad
    assert torch.equal(iecl.transform(x, 0, "online"), x)
    made = Made({0: net(x), 1: net(x)}, {0: anchor, 1: anchor})
    total(iecl.terms(made, 0.0)).backward()
    assert all(p.grad is not None and p.grad.any() for p in iecl.saib.parameters())
    for block in ({"beta": 0.0}, {"kl": {"space": "embedding"}}):
        block = {"placement": "anchor", "generation": {"weight": 0.0}, **block}
        with pytest.raises(IECLError, match=r"iecl\.placement: anchor: .* no gradient") as refusal:
            objective(block, WITH_MOMENTUM)
        assert "\n" not in str(refusal.value)
        objective({**block, "placement": "both"}, WITH_MOMENTUM)
        objective(block, PAIR)  # the host's loss reaches it there


def test_the_host_trains_with_saib_on_a_momentum_networks_anchor(images: Path) -> None:
    model = build("iecl_byol", images, iecl={"placement": "anchor"})
    before = {k: v.clone() for k, v in model.iecl.saib.state_dict().items()}
    train_on(model, batches(2))
    assert same_tensors(before, model.iecl.saib.state_dict()), "SAIB was not trained"


# --- the host's gradient


def test_the_hosts_gradient_is_with_without_or_against() -> None:
    x, grads = photographs(4), {}
    for mode in ("with", "without", "against"):
        iecl = objective({"saib": {"variant": "noise", "host_gradient": mode}})
        out = iecl.transform(x, 1, "online")
        loss = (out * x.flip(-1)).sum()
        if mode == "without":
            assert not loss.requires_grad
            continue
        loss.backward()
        grads[mode] = [p.grad for p in iecl.saib.parameters()]
    for a, b in zip(grads["with"], grads["against"], strict=True):
        assert a.any() and torch.equal(a, -b)


def test_the_default_is_the_variants_own() -> None:
    assert objective({}).host_gradient == "with"
    assert objective({"saib": {"variant": "convex"}}).host_gradient == "with"
    assert objective({"saib": {"variant": "noise"}}).host_gradient == "against"


# --- noise and its budget


def _reference_agreement(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    one, two = one - one.mean(0), two - two.mean(0)
    rows = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(one, two, strict=True)]
    return torch.stack(rows).mean()


def test_agreement_is_of_positive_pairs() -> None:
    z = F.normalize(torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    one, two, three, four = z.unbind(0)
    expected = _reference_agreement(one, two)
    torch.testing.assert_close(agreement(Made({0: 3 * one, 1: two}), PAIR), expected)
    made = Made({0: one, 1: two}, {0: three, 1: four})
    crossed = (_reference_agreement(one, four) + _reference_agreement(two, three)) / 2
    torch.testing.assert_close(agreement(made, WITH_MOMENTUM), crossed)
    only = agreement(Made({0: one}, {0: three}), WITH_MOMENTUM)
    torch.testing.assert_close(only, _reference_agreement(one, three))


def test_embeddings_that_are_all_alike_do_not_agree() -> None:
    """Of an encoder that has collapsed the plain cosine is 1, and would raise the budget."""
    generator = torch.Generator().manual_seed(0)
    shared, noise = torch.ones(16), torch.randn(2, 256, 16, generator=generator)
    one, two = shared + 0.01 * noise
    assert F.cosine_similarity(one, two).mean() > 0.99
    assert agreement(Made({0: one, 1: two}), PAIR).abs() < 0.1


@pytest.mark.parametrize(
    ("hold", "level", "end"),
    [("agreement", 0.9, 0.3), ("agreement", 0.999, 0.01), ("patch_kl", 1e-4, 0.01)],
)
def test_the_budget_goes_where_the_measure_sends_it(hold: str, level: float, end: float) -> None:
    budget = {"hold": hold, "level": level, "rate": 100.0}
    iecl = objective({**KL_ALONE, "saib": {"variant": "noise", "budget": budget}})
    x, z = photographs(8), torch.randn(8, 16)
    made = Made({0: z, 1: z + 0.2 * torch.randn(8, 16)})  # agreement about 0.98
    for _ in range(3):
        iecl.transform(x, 1, "online")
        terms = iecl.terms(made, 0.0)
    assert iecl.saib.budget == pytest.approx(end, rel=1e-3)
    assert {"agreement", "budget"} <= terms.keys()
    before = iecl.saib.log_budget.clone()
    iecl.eval().terms(made, 0.0)
    iecl.train().transform(x * math.nan, 1, "online")
    iecl.terms(Made({0: z * math.nan, 1: z}), 0.0)
    assert torch.equal(iecl.saib.log_budget, before), "moved by a measurement or by a NaN"


def test_the_budget_settles_where_the_measure_is_at_its_level() -> None:
    """An agreement that falls with the step, as a real one does: 1 - 2 budget."""
    budget = {"hold": "agreement", "level": 0.6, "rate": 0.1}
    iecl = objective({**KL_ALONE, "saib": {"variant": "noise", "budget": budget}})
    half = F.normalize(torch.randn(2, 32, 16), dim=-1)
    one, other = torch.cat([half, -half], dim=1)  # their mean is 0
    other = F.normalize(other - (other * one).sum(-1, keepdim=True) * one, dim=-1)
    for _ in range(300):
        cosine = 1 - 2 * iecl.saib.budget
        iecl.terms(Made({0: one, 1: cosine * one + (1 - cosine**2) ** 0.5 * other}), 0.0)
    assert iecl.saib.budget == pytest.approx(0.2, rel=0.01)


def test_a_run_with_noise_and_a_budget_resumes(images: Path, tmp_path: Path) -> None:
    saib = {"variant": "noise", "budget": {"hold": "agreement", "rate": 0.5}}
    for measure in ("patch", "jacobian"):
        iecl = {"saib": saib, "generation": {"weight": 0.1, "measure": measure}}
        assert_resumes("iecl_simclr", images, tmp_path / f"{measure}.ckpt", iecl=iecl)


def test_training_moves_no_random_number_of_the_host(images: Path) -> None:
    block = {"saib": {"variant": "noise"}, "generation": {"weight": 0.1, "measure": "jacobian"}}
    states = []
    for iecl in ({"placement": "none"}, block):
        model = build("iecl_simclr", images, iecl=iecl)
        train_on(model, batches(2))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_noise_is_logged_and_moves_every_image_by_its_budget(images: Path) -> None:
    model = build("iecl_simclr", images, iecl={"saib": {"variant": "noise"}})
    assert isinstance(model.iecl.saib, NoiseSAIB)
    x = torch.randn(8, 3, 32, 32)
    step = model.iecl.transform(x, 1, "online") - x
    start = model.iecl.config.saib.budget.start
    torch.testing.assert_close(
        step.abs().mean((1, 2, 3)), torch.full((8,), start), rtol=1e-3, atol=0
    )


# --- refusals


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"kl": {"space": "pixel"}}, r"iecl\.kl\.space.*embedding, input"),
        ({"regularizer": {"fold": True, "mode": "parametrize"}}, r"iecl\.regularizer\.fold"),
        ({"kl": {"shrinkage": 0.1}}, r"iecl\.kl\.shrinkage: only space embedding"),
        ({"kl": {"space": "embedding", "shrinkage": 0.1}}, "only covariance full has one"),
        (
            {"kl": {"space": "embedding", "covariance": "full", "shrinkage": 7.0}},
            r"iecl\.kl\.shrinkage: 7\.0 is not allowed",
        ),
        (
            {"regularizer": {"mode": "parametrize", "norm": "convolution"}},
            r"iecl\.regularizer\.norm: .*parametrize has no such option; penalty has it",
        ),
        (
            {"regularizer": {"mode": "volume", "power_iterations": 9}},
            "penalty and bilipschitz have it",
        ),
        ({"regularizer": {"sigma_min_floor": 0.5}}, "bilipschitz has it"),
        (
            {"regularizer": {"mode": "bilipschitz", "sigma_min_floor": 7.0}},
            r"sigma_min_floor: 7\.0 is not allowed",
        ),
        (
            {"saib": {"variant": "noise", "budget": {"level": 7.0}}},
            r"iecl\.saib\.budget\.level: 7\.0 is not allowed, a number from -1 to 1",
        ),
        ({"saib": {"variant": "noise", "budget": {"level": math.nan}}}, "level: nan"),
        ({"generation": {"measure": "pach"}}, "did you mean 'patch'"),
        ({"generation": {"weight": -1.0}}, r"iecl\.generation\.weight"),
        ({"saib": {"host_gradient": "off"}}, r"iecl\.saib\.host_gradient"),
        ({"saib": {"host_gradient": "against"}}, "needs variant noise"),
        ({"saib": {"budget": {"start": 0.3}}}, "only variant noise has one"),
        ({"saib": {"variant": "noise", "budget": {"start": 0.9}}}, "0 < min <= start <= max"),
        (
            {"saib": {"variant": "noise", "budget": {"hold": "agrement"}}},
            "did you mean 'agreement'",
        ),
        ({"saib": {"variant": "noise", "budget": {"strat": 0.9}}}, "did you mean 'start'"),
        ({"saib": {"variant": "noise", "outer_skip": True}}, "option of the noise SAIB"),
        ({"saib": {"noise_channels": 4}}, "option of the paper SAIB"),
    ],
    ids=str,
)
def test_refused_in_one_line(block: dict, words: str) -> None:
    with pytest.raises(IECLError, match=words) as refusal:
        objective(block)
    assert "\n" not in str(refusal.value)


def test_a_default_stands_in_one_place() -> None:
    saib = IECLConfig().saib
    assert saib.build(32).options == objective({}).saib.options
    assert saib.build(32).options["outer_skip"] is False
    assert saib.build(32).options["match_statistics"] is True
