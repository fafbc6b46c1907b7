"""``performance.blocked_infonce``: the host's loss and gradient, pairs in blocks."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import HOST, batches, config, image_folder, mebibytes

from iecl_solo.errors import IECLError
from iecl_solo.solo.build import build_model
from iecl_solo.solo.infonce import use_blocked_infonce


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "train")


def losses(model: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's whole loss, and the gradient of each weight."""
    torch.manual_seed(0)
    model.train()
    model.log = model.log_dict = lambda *_, **__: None
    loss = model.training_step(batch, 0)
    loss.backward()
    return float(loss), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["simclr", "iecl_simclr"])
def test_loss_and_gradient_are_the_hosts(method: str, images: Path, monkeypatch: Any):
    torch.manual_seed(0)
    model = build_model(config(method, images), HOST)
    monkeypatch.setattr(type(model), "_epoch", lambda self, batch: 0.0, raising=False)
    switched = copy.deepcopy(model)
    use_blocked_infonce(switched, HOST)
    use_blocked_infonce(switched, HOST)  # once is enough, twice is harmless
    blocked = copy.deepcopy(switched)  # and a copy trains itself
    (batch,) = batches(1, batch_size=16)
    its, its_gradients = losses(model, batch)
    ours, our_gradients = losses(blocked, batch)
    assert ours == pytest.approx(its, rel=1e-5)
    assert our_gradients.keys() == its_gradients.keys()
    for name, gradient in its_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_configuration_switches_it_on_and_the_host_keeps_its_own(images: Path):
    module = sys.modules[HOST.methods["simclr"].__module__]
    own = module.simclr_loss_func
    switched = build_model(config("simclr", images, performance__blocked_infonce=True), HOST)
    untouched = build_model(config("simclr", images), HOST)
    seen: list[Any] = []
    (batch,) = batches(1)
    for model in (switched, untouched):
        model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        model.projector.register_forward_hook(lambda *_: seen.append(module.simclr_loss_func))
        model.train().training_step(batch, 0)
    assert seen[0] is not own and seen[-1] is own
    assert module.simclr_loss_func is own


def test_it_is_put_back_after_a_failure(images: Path):
    module = sys.modules[HOST.methods["simclr"].__module__]
    own = module.simclr_loss_func
    model = build_model(config("simclr", images, performance__blocked_infonce=True), HOST)
    with pytest.raises(Exception):  # noqa: B017 - whatever a host makes of no batch
        model.training_step([None, None, None], 0)
    assert module.simclr_loss_func is own


def test_other_methods_are_refused(images: Path):
    with pytest.raises(IECLError, match=r"blocked_infonce: BYOL is not SimCLR or a variant of it"):
        build_model(config("byol", images, performance__blocked_infonce=True), HOST)


_MANY = """
import torch
import iecl_solo
from iecl_solo import entropy
from iecl_solo.solo.host import find_host
from types import SimpleNamespace
host = find_host()
entropy.BLOCK_ELEMENTS = 2**20
loss = host.blocked_infonce(SimpleNamespace(multicrop=False))
z = torch.randn(4096, 64, requires_grad=True)

def step(z):
    half = len(z) // 2
    if host.name == "main":
        value = loss(z, indexes=torch.arange(half).repeat(2), temperature=0.2)
    else:
        value = loss(z[:half], z[half:], temperature=0.2)
    value.backward()

step(z[:2048])
before = peak()
step(z)
assert z.grad.isfinite().all()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="reads /proc")
def test_memory_grows_with_the_embeddings_and_not_with_their_square():
    # one matrix of 4,096 x 4,096 is 64 MiB, and the hosts form five and more;
    # studies/scaling.py measures 32,768
    assert mebibytes(_MANY) < 40
