"""InfoNCE in blocks against the host's own loss, a slow reference, and one process."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from support import HOST, in_two_processes, mebibytes
from torch import Tensor

from iecl_solo import entropy
from iecl_solo.errors import IECLError
from iecl_solo.losses import info_nce

IMAGES = {
    "two views": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    "an image twice": [0, 1, 2, 1, 4, 0, 1, 2, 1, 4],
    "three views": [0, 1, 2, 0, 1, 2, 0, 1, 2],
}


def embeddings(rows: int, dim: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return z.to(dtype).requires_grad_()


def slowly(z: Tensor, indexes: Tensor, temperature: float, positives: str) -> Tensor:
    """Row by row and pair by pair."""
    losses = []
    for i in range(len(z)):
        terms = {
            j: torch.exp(torch.cosine_similarity(z[i], z[j], dim=0) / temperature)
            for j in range(len(z))
            if j != i
        }
        same = [terms[j] for j in terms if indexes[j] == indexes[i]]
        if positives == "joint":
            losses.append(-torch.log(sum(same) / sum(terms.values())))
        else:
            losses.append(sum(-torch.log(s / sum(terms.values())) for s in same) / len(same))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("positives", ["joint", "each"])
@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_against_loops(case, positives, in_blocks, dtype, monkeypatch):
    indexes = torch.tensor(IMAGES[case])
    z = embeddings(len(indexes), dtype=dtype)
    truth = slowly(z.double(), indexes, 0.2, positives)
    (expected,) = torch.autograd.grad(truth, z)
    if in_blocks:  # of three rows: the last one is shorter
        monkeypatch.setattr(entropy, "BLOCK_ELEMENTS", 3 * len(indexes))
    value = info_nce(z, indexes, temperature=0.2, positives=positives)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.dtype == dtype
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradcheck():
    indexes = torch.tensor(IMAGES["an image twice"])
    for positives in ("joint", "each"):
        assert torch.autograd.gradcheck(
            lambda z, p=positives: info_nce(z, indexes, temperature=0.5, positives=p),
            embeddings(len(indexes)),
        )


def hosts_loss(z: Tensor, indexes: Tensor) -> tuple[Tensor, str]:
    """The host's SimCLR loss of the same, and which positives it has."""
    assert HOST is not None
    from solo.losses.simclr import simclr_loss_func

    if "indexes" in inspect.signature(simclr_loss_func).parameters:
        return simclr_loss_func(z, indexes, temperature=0.2), "joint"
    same = (indexes[:, None] == indexes).fill_diagonal_(False)
    return simclr_loss_func(*z.chunk(2), temperature=0.2, extra_pos_mask=same), "each"


@pytest.mark.parametrize("case", ["two views", "an image twice"])
@pytest.mark.parametrize("blocks", [1, 10])
def test_it_is_the_hosts_loss(case: str, blocks: int, monkeypatch):
    indexes = torch.tensor(IMAGES[case]).repeat_interleave(20) * 20
    indexes = indexes + torch.arange(20).repeat(10)
    z = embeddings(200, 32, torch.float32)
    expected, positives = hosts_loss(z, indexes)
    (gradient,) = torch.autograd.grad(expected, z)
    monkeypatch.setattr(entropy, "BLOCK_ELEMENTS", 200 * 200 // blocks)
    value = info_nce(z, indexes, temperature=0.2, positives=positives)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype: torch.dtype):
    indexes = torch.tensor(IMAGES["two views"])
    z = embeddings(10).detach().to(dtype).requires_grad_()
    exact = z.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = info_nce(z, indexes)
        value.backward()
    truth = info_nce(exact, indexes)
    truth.backward()
    assert value.dtype == torch.float32 and torch.equal(value, truth)
    assert torch.equal(z.grad, exact.grad.to(dtype))


def test_small_temperatures_do_not_overflow():
    indexes = torch.tensor(IMAGES["two views"])
    z = embeddings(10, dtype=torch.float32)
    value = info_nce(z, indexes, temperature=1e-3)
    value.backward()
    truth = info_nce(z.detach().double(), indexes, temperature=1e-3)
    assert value.item() == pytest.approx(truth.item(), rel=1e-4) and z.grad.isfinite().all()


WORKER = """
from iecl_solo import entropy
from iecl_solo.losses import info_nce
entropy.BLOCK_ELEMENTS = 30
linear = torch.nn.Linear(5, 4).double()
linear.load_state_dict(given["linear"])
model, result = DistributedDataParallel(linear), {}
x, indexes = (given[name].chunk(2, dim=1)[rank].flatten(0, 1) for name in ("x", "indexes"))
for positives in ("joint", "each"):
    model.zero_grad()
    value = info_nce(model(x), indexes, temperature=0.3, positives=positives)
    value.backward()
    result[positives] = value.detach(), [p.grad.clone() for p in linear.parameters()]
"""


def test_two_processes_are_one(tmp_path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4).double()
    x = torch.randn(2, 8, 5, dtype=torch.float64)  # (view, image, feature)
    # an image that both processes have, and one that one has twice
    indexes = torch.tensor([0, 1, 2, 2, 4, 5, 6, 1]).repeat(2, 1)
    given = {"linear": linear.state_dict(), "x": x, "indexes": indexes}
    found = in_two_processes(WORKER, given, tmp_path)
    for positives in ("joint", "each"):
        linear.zero_grad()
        z = linear(x.flatten(0, 1))
        value = info_nce(z, indexes.flatten(), temperature=0.3, positives=positives)
        value.backward()
        mean = torch.stack([result[positives][0] for result in found]).mean()
        torch.testing.assert_close(mean, value.detach())
        for result in found:
            for got, p in zip(result[positives][1], linear.parameters(), strict=True):
                torch.testing.assert_close(got, p.grad)


MEMORY = """
import torch
from iecl_solo import entropy
from iecl_solo.losses import info_nce
entropy.BLOCK_ELEMENTS = 2**20
z = torch.randn(4096, 32).requires_grad_()
indexes = torch.arange(2048).repeat(2)
info_nce(z[:2048], indexes[:2048] % 1024).backward()
before = peak()
info_nce(z, indexes).backward()
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_square_of_the_batch():
    """One (N, N) matrix is 64 MiB, a block of its rows 4, and a value and gradient hold several."""
    assert mebibytes(MEMORY) < 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, i: info_nce(z, i[:2]), r"shape \(2,\)"),
        (lambda z, i: info_nce(z, i.float()), r"\(4,\) integers"),
        (lambda z, i: info_nce(z[0], i), r"shape \(3,\)"),
        (lambda z, i: info_nce(z, i, temperature=0.0), "temperature: 0.0"),
        (lambda z, i: info_nce(z, i, positives="jont"), "did you mean 'joint'"),
    ],
)
def test_bad_input_is_refused_in_one_line(call: Callable, message: str):
    with pytest.raises(IECLError, match=message) as error:
        call(torch.ones(4, 3), torch.arange(4))
    assert "\n" not in str(error.value)


def test_a_row_without_a_positive_is_said_by_its_value():
    z, indexes = torch.eye(3), torch.tensor([0, 0, 1])
    assert info_nce(z, indexes).item() == math.inf
    assert info_nce(z, indexes, positives="each").isnan()
