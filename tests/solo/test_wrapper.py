"""``with_objective`` on every method of the host: it trains, logs, and weighing 0 is absent."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    HOST,
    METHOD_KWARGS,
    OFF,
    batches,
    build,
    config,
    online,
    pipeline,
    same_tensors,
    train_on,
)
from torch import nn

from iecl_solo.errors import IECLError
from iecl_solo.objectives.iecl import IECL
from iecl_solo.objectives.protocol import Made
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import find_host
from iecl_solo.solo.registry import added_methods, check_method, split_method
from iecl_solo.solo.wrapper import REFUSED, with_objective

VARIANTS = sorted(m for m in added_methods() if split_method(m)[0] == ["iecl"])
NAMED = [m for m in ("simclr", "mocov2plus", "byol", "simsiam", "mocov3") if m in HOST.methods]
NO_MOMENTUM = "simclr"
#: A SAIB that begins as x -> 2x: what has been through it can be told at once.
DOUBLING = {"saib": {"outer_skip": True, "match_statistics": False}}


def test_every_method_of_the_host_has_a_variant_or_a_reason():
    hosts = {n for n in HOST.methods if f"iecl_{n}" not in HOST.methods and n[:5] != "iecl_"}
    assert {HOST.methods[n].__name__ for n in hosts} <= set(REFUSED)
    assert {t.removeprefix("iecl_") for t in VARIANTS} <= set(METHOD_KWARGS)


@pytest.mark.parametrize("method", VARIANTS)
def test_trains_two_steps_and_saib_moves(method: str, images: Path):
    model = build(method, images)
    before = {k: v.clone() for k, v in model.iecl.saib.state_dict().items()}
    weights = {k: v.clone() for k, v in online(model).state_dict().items()}
    logged: dict[str, float] = {}

    def keep(values, **_):
        logged.update({k: float(v) for k, v in values.items()})

    log_dict = model.log_dict
    model.log_dict = lambda values, **kw: (keep(values), log_dict(values, **kw))
    # real images: DeepCluster v2 keeps a memory of the whole data set
    train_on(model, pretrain_loader(config(method, images), HOST), max_steps=2)
    assert same_tensors(before, model.iecl.saib.state_dict()), "SAIB was not trained"
    assert same_tensors(weights, online(model).state_dict()), "the network was not trained"
    for term in ("kl", "patch_kl", "generation", "entropy", "regularizer", "saib_decay"):
        assert torch.isfinite(torch.tensor(logged[f"train_iecl_{term}"])), term
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", VARIANTS)
def test_views_go_where_the_paper_sends_them(method: str, images: Path):
    """The query is transformed; the anchor, the momentum side above all, sees its raw view."""
    model = build(method, images)
    with torch.no_grad():
        for p in model.iecl.saib.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    seen: dict[str, list[torch.Tensor]] = {"online": [], "momentum": []}
    for side, name in (("online", HOST.online), ("momentum", HOST.momentum)):
        if hasattr(model, name):
            getattr(model, name).register_forward_pre_hook(
                lambda _, args, side=side: seen[side].append(args[0].detach().clone())
            )
    raw: list[torch.Tensor] = []
    step = model.training_step

    def spy(batch, batch_idx):
        seen["online"].clear()  # what DeepCluster v2 looked at before the first step
        raw.extend(v.clone() for v in batch[1])
        return step(batch, batch_idx)

    model.training_step = spy
    train_on(model, pretrain_loader(config(method, images), HOST), max_steps=1)
    query = model.iecl.views.query
    assert query == ((0, 1) if seen["momentum"] else (1,))
    for view in (0, 1):
        changed = not torch.allclose(seen["online"][view], raw[view])
        assert changed == (view in query), f"online view {view}"
    for view, x in enumerate(seen["momentum"]):
        assert any(torch.equal(x, r) for r in raw), f"momentum view {view}"


@pytest.mark.parametrize(
    ("placement", "changed"),
    [("none", []), ("query", [1]), ("anchor", [0]), ("both", [0, 1])],
)
def test_placement_is_the_papers_figure_3(placement: str, changed: list[int], images: Path):
    model = build("iecl_simclr", images, iecl={"placement": placement, **DOUBLING})
    x = torch.randn(2, 3, 32, 32)
    got = [v for v in (0, 1) if not torch.equal(model.iecl.transform(x, v, "online"), x)]
    assert got == changed


def test_evaluation_never_sees_saib(images: Path):
    model = train_on(build("iecl_simclr", images), batches(2)).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x)["feats"], online(model)(x))


def test_taps_are_taken_out_when_a_step_fails(images: Path):
    model = build("iecl_simclr", images)
    network, projector = online(model), model.projector
    with pytest.raises(Exception):  # noqa: B017  (labels of the wrong type, whatever is raised)
        model.training_step([torch.arange(8), [torch.randn(8, 3, 32, 32)] * 2, "labels"], 0)
    assert online(model) is network and model.projector is projector


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_precision_and_accumulation(precision: str, accumulate: int, images: Path):
    model = build("iecl_byol", images, precision=precision, accumulate_grad_batches=accumulate)
    dtypes: list[torch.dtype] = []
    terms = model.iecl.terms

    def spy(*args):
        out = terms(*args)
        dtypes.extend(t.value.dtype for t in out.values())
        return out

    model.iecl.terms = spy
    train_on(model, batches(4), precision=precision, accumulate_grad_batches=accumulate)
    assert set(dtypes) == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", NAMED)
def test_batch_of_two(method: str, images: Path):
    options = {"method_kwargs__queue_size": 8} if method == "mocov2plus" else {}
    model = train_on(build(f"iecl_{method}", images, **options), batches(2, batch_size=2))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_multicrop_leaves_small_crops_alone(images: Path):
    crops = [pipeline(crop_size=32), pipeline(crop_size=16)]
    both = build("iecl_simclr", images, augmentations=crops, iecl=DOUBLING)
    seen: list[torch.Tensor] = []
    online(both).register_forward_pre_hook(lambda _, a: seen.append(a[0].detach().clone()))
    items = batches(1, sizes=[32, 32, 16, 16])
    train_on(both, items)
    raw = items[0][1]
    assert len(seen) == 4 and not torch.allclose(seen[1], raw[1])
    assert torch.equal(seen[0], raw[0]) and torch.equal(seen[2], raw[2])
    assert torch.equal(seen[3], raw[3])


def test_channels_last_stays_channels_last(images: Path):
    model = build("iecl_simclr", images)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    out = model.iecl.transform(x, 1, "online")
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_backbone_still_gets_the_query(in_place: bool, images: Path):
    model = build("iecl_simclr", images)
    if in_place:
        online(model).compile(backend="eager")
    else:
        setattr(model, HOST.online, torch.compile(online(model), backend="eager"))
    plain = build("iecl_simclr", images)
    train_on(plain, batches(2))
    train_on(model, batches(2))
    ours = {k.replace("_orig_mod.", ""): v for k, v in model.state_dict().items()}
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


def test_parametrized_networks_train_and_follow(images: Path):
    iecl = {"eta": 1.0, "regularizer": {"mode": "parametrize"}}
    model = build("iecl_byol", images, iecl=iecl, backbone__name="resnet18")
    train_on(model, batches(3))
    conv = online(model).conv1.weight.detach().flatten(1)
    sigma = torch.linalg.matrix_norm(conv, 2)
    assert 0.8 < float(sigma) < 1.2
    momentum = getattr(model, HOST.momentum).conv1.weight.detach().flatten(1)
    assert 0.8 < float(torch.linalg.matrix_norm(momentum, 2)) < 1.2


def test_a_parametrized_weight_is_made_once_a_step(images: Path, monkeypatch: pytest.MonkeyPatch):
    regularizer = {"mode": "parametrize"}
    model = build("iecl_simclr", images, iecl={"regularizer": regularizer})
    made: list[int] = []
    kind = torch.nn.utils.parametrizations._SpectralNorm
    real = kind.forward

    def counted(self: Any, weight: torch.Tensor) -> torch.Tensor:
        made.append(id(self))
        return real(self, weight)

    monkeypatch.setattr(kind, "forward", counted)
    train_on(model, batches(1))
    assert made and len(made) == len(set(made))  # two views, one weight of each layer


def test_warmup_ramps_the_weights(images: Path):
    model = build("iecl_simclr", images, iecl={"beta": 1.0, "beta_warmup_epochs": 10})
    made = Made({0: torch.randn(8, 4), 1: torch.randn(8, 4)})
    weights = []
    for epoch in (0.0, 5.0, 20.0):
        model.iecl.transform(torch.randn(8, 3, 32, 32), 1, "online")
        weights.append(model.iecl.terms(made, epoch)["patch_kl"].weight)
    assert weights == [0.0, 0.5, 1.0]


def test_saib_has_its_own_group_without_the_hosts_decay(images: Path):
    model = build("iecl_simclr", images, iecl={"saib_lr_multiplier": 0.5})
    (group,) = [g for g in model.learnable_params if g.get("name") == "iecl"]
    assert group["weight_decay"] == 0.0 and group["lr"] == 0.5 * model.lr
    assert {id(p) for p in group["params"]} == {id(p) for p in model.iecl.parameters()}
    assert build("iecl_simclr", images, iecl=OFF).learnable_params[-1].get("name") != "iecl"


def test_methods_pickle_by_name(images: Path):
    cls = HOST.methods["iecl_simclr"]
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert isinstance(pickle.loads(pickle.dumps(build("iecl_simclr", images))), nn.Module)


@pytest.mark.parametrize("name", ["linear", "base", "mae"])
def test_refused_by_name_with_the_reason(name: str):
    classes = {"linear": "LinearModel", "base": "BaseMethod", "mae": "MAE"}
    fake = type(classes[name], (), {})
    with pytest.raises(IECLError, match=classes[name]) as error:
        with_objective(fake, IECL)
    assert REFUSED[classes[name]] in str(error.value)
    if name in HOST.methods:
        with pytest.raises(IECLError, match="is refused: "):
            check_method(f"iecl_{name}")


def test_unknown_method_names_the_nearest():
    with pytest.raises(IECLError, match="did you mean 'iecl_simclr'"):
        check_method("iecl_simclrr")


@pytest.mark.parametrize("views", [[2], [0, 1], []])
def test_impossible_query_views_are_refused(views: list[int], images: Path):
    with pytest.raises(IECLError, match="query_views"):
        build(f"iecl_{NO_MOMENTUM}", images, iecl={"query_views": views})


def test_registration_is_idempotent():
    from iecl_solo.solo.registry import register

    before = dict(find_host().methods)
    register()
    assert find_host().methods == before


@pytest.mark.parametrize(
    "block",
    [
        {"entropy": {"estimator": "gaussian", "shrinkage": 0.2}},
        {"entropy": {"estimator": "knn", "num_neighbors": 2}},
        {"entropy": {"estimator": "vmf_kde"}},
        {"entropy": {"estimator": "renyi", "alpha": 1.5}},
        {"kl": {"covariance": "diagonal"}},
        {"kl": {"space": "embedding", "covariance": "full", "shrinkage": 0.2}},
        {"kl": {"space": "embedding"}, "saib": {"host_gradient": "without"}},
        {"generation": {"weight": 0.1, "measure": "jacobian"}},
        {"generation": {"weight": 0.0}},
        {"saib": {"variant": "noise"}},
        {"saib": {"variant": "noise", "host_gradient": "with", "budget": {"hold": "agreement"}}},
        {"regularizer": {"mode": "bilipschitz"}},
        {"regularizer": {"norm": "convolution"}},
        {"saib": {"variant": "convex", "depth": 2}},
        {"saib": {"match_statistics": False, "outer_skip": True, "inner_skip": False}},
    ],
    ids=str,
)
def test_every_choice_of_the_block_trains(block: dict, images: Path):
    model = train_on(build("iecl_simclr", images, iecl=block), batches(2))
    assert all(torch.isfinite(p).all() for p in model.parameters())
