"""``spectral`` and ``minc`` as methods of the host: they train, resume, export, take options."""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from support import (
    HOST,
    assert_resumes,
    batches,
    build,
    config,
    online,
    pipeline,
    raw_config,
    same_tensors,
    train_on,
)
from torch import Tensor, nn

from iecl_solo.cli.main import main as cli
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.load import load_backbone, load_method, read_pretrained
from iecl_solo.losses import MINCLoss, spectral_contrastive_loss
from iecl_solo.methods.minc import MINC, MINCConfig
from iecl_solo.methods.spectral import Spectral, SpectralConfig
from iecl_solo.solo.build import build_model
from iecl_solo.solo.registry import WHOLE, added_methods, check_method, complete_objective
from iecl_solo.train.fit import pretrain

METHODS = [method.name for method in WHOLE]


def embeddings(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 6, 4, generator=generator))


# --- the methods themselves


def test_spectral_is_its_loss_on_two_crops():
    z1, z2 = embeddings(2)
    value = Spectral(SpectralConfig(mu=2.0))([z1, z2], [], [], 0.0)
    torch.testing.assert_close(value, spectral_contrastive_loss(z1, z2, mu=2.0))


def test_minc_is_its_loss_with_both_crops_on_both_sides():
    z1, z2, t1, t2 = embeddings(4)
    method, loss = (
        MINC(MINCConfig(proj_output_dim=4)),
        MINCLoss(4, final_decay=0.99, mu=MINCConfig.mu),
    )
    for progress in (0.0, 0.5):
        value = method([z1, z2], [], [t1, t2], progress)
        expected = loss(torch.cat([z2, z1]), torch.cat([t1, t2]), progress)
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(method.loss.second_moment, loss.second_moment)


@pytest.mark.parametrize(
    "method", [Spectral(SpectralConfig()), MINC(MINCConfig(proj_output_dim=4))]
)
def test_small_crops_meet_large_ones_and_not_each_other(method: nn.Module):
    crops = [z.requires_grad_() for z in embeddings(4)]
    momentum = embeddings(2, seed=1) if method.momentum else []
    method.eval()  # Lambda is 0: what is left is the attraction
    method(crops[:2], crops[2:], momentum, 0.0).backward()
    assert all(z.grad.abs().max() > 0 for z in crops)
    whole = crops[2].grad.clone()
    for z in crops:
        z.grad = None
    with torch.no_grad():
        crops[3].mul_(0)
    method(crops[:2], crops[2:], momentum, 0.0).backward()
    torch.testing.assert_close(crops[2].grad, whole)


# --- as methods of the host


@pytest.mark.parametrize("name", METHODS)
def test_registered_and_so_is_its_variant(name: str):
    for method in (name, f"iecl_{name}"):
        check_method(method)
        assert method in HOST.methods and method in added_methods()
    assert issubclass(HOST.methods[name], HOST.base_method)
    assert issubclass(HOST.methods[f"iecl_{name}"], HOST.methods[name])
    assert pickle.loads(pickle.dumps(HOST.methods[name])) is HOST.methods[name]


@pytest.mark.parametrize("name", METHODS)
def test_trains_network_and_projector_and_logs_its_loss(name: str, images: Path):
    model = build(name, images)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_on(model, batches(3))
    moved = same_tensors(before, model.state_dict())
    for part in (f"{HOST.online}.", "projector.", "classifier."):
        assert any(k.startswith(part) for k in moved), part
    momentum = {k.partition(".")[0] for k in moved if k.startswith("momentum_")}
    assert momentum == ({HOST.momentum, "momentum_projector"} if name == "minc" else set())
    assert all(p.isfinite().all() for p in model.parameters())
    logged = model.trainer.callback_metrics
    assert logged[f"train_{name}_loss_epoch"].isfinite()
    assert {"train_class_loss_epoch", "train_acc1_epoch"} <= set(logged)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_the_hosts_classification_loss_and_its_own(name: str, images: Path):
    model = build(name, images)
    steps: list[Tensor] = []
    step = model.training_step

    def spy(batch, batch_idx):
        steps.append(step(batch, batch_idx).detach())
        return steps[-1].clone().requires_grad_()

    model.training_step = spy
    train_on(model, batches(1))
    logged = model.trainer.callback_metrics
    torch.testing.assert_close(steps[0], logged[f"train_{name}_loss"] + logged["train_class_loss"])


@pytest.mark.parametrize("name", METHODS)
def test_multicrop(name: str, images: Path):
    crops = [pipeline(crop_size=32), pipeline(crop_size=16)]
    model = build(name, images, augmentations=crops)
    seen: list[list[int]] = []
    method = getattr(model, name)
    method.register_forward_pre_hook(lambda _, args: seen.append([len(a) for a in args[:3]]))
    train_on(model, batches(2, sizes=[32, 32, 16, 16]))
    assert seen == [[2, 2, 2 if name == "minc" else 0]] * 2
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_each_crop_is_embedded_once_a_step(name: str, images: Path):
    """A second pass would count twice in batch norm's running statistics."""
    model = build(name, images)
    train_on(model, batches(2))
    assert int(model.projector[1].num_batches_tracked) == 4


def test_momentum_networks_start_equal_and_follow(images: Path):
    model = build("minc", images)
    online_state = {k: v.clone() for k, v in model.projector.state_dict().items()}
    assert same_tensors(online_state, model.momentum_projector.state_dict()) == []
    train_on(model, batches(1))
    tau = 0.9
    for start, now, copy in zip(
        [online_state[k] for k in ("0.weight", "3.weight")],
        [model.projector[i].weight for i in (0, 3)],
        [model.momentum_projector[i].weight for i in (0, 3)],
        strict=True,
    ):
        torch.testing.assert_close(copy, tau * start + (1 - tau) * now)


def test_the_decay_follows_the_training(images: Path):
    model = build("minc", images)
    seen: list[float] = []
    model.minc.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    train_on(model, batches(2), epochs=2)
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("name", METHODS)
def test_precision(name: str, precision: str, images: Path):
    model = train_on(build(name, images, precision=precision), batches(2), precision=precision)
    assert all(p.isfinite().all() for p in model.parameters())
    if name == "minc":
        assert model.minc.loss.moving_moment.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_a_vit_is_the_hosts_default_one(name: str, images: Path):
    kwargs = {"img_size": 32, "patch_size": 4}
    model = build(name, images, backbone__name="vit_tiny", backbone__kwargs=kwargs)
    bare = build("simclr", images, backbone__name="vit_tiny", backbone__kwargs=kwargs)
    assert type(online(model)) is type(online(bare))


@pytest.mark.parametrize("name", [*METHODS, "iecl_minc"])
def test_resumed_run_is_the_uninterrupted_one(name: str, images: Path, tmp_path: Path):
    path = tmp_path / "half.ckpt"
    assert_resumes(name, images, path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert ("minc.loss.moving_moment" in state) == ("minc" in name)
    # the host's scripts take every key with these words for the network
    strange = [k for k in state if "encoder" in k or "backbone" in k]
    assert all(k.startswith((f"{HOST.online}.", f"{HOST.momentum}.")) for k in strange)


@pytest.mark.parametrize("name", METHODS)
def test_run_exports_and_comes_back(name: str, images: Path, tmp_path: Path, capsys):
    raw = raw_config(name, images, max_epochs=1, checkpoint__dir=str(tmp_path / "runs"))
    raw["monitor"] = {"every_n_epochs": 0}
    run = pretrain(OmegaConf.create(raw))
    out = tmp_path / "network.safetensors"
    assert cli(["export", str(run.folder), "--to", str(out)]) == 0
    printed = capsys.readouterr().out
    recipe = printed[printed.index("written: ") :].splitlines()[1:]
    pretrained = read_pretrained(run.folder)
    assert same_tensors(load_file(out), load_backbone(pretrained, HOST).state_dict()) == []
    script = "\n".join([*recipe, "import sys; assert 'iecl_solo' not in sys.modules; print('ok')"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
    model = load_method(pretrained, HOST)
    if name == "minc":
        assert model.minc.loss.second_moment.trace() > 0
        assert pretrained.cfg.method_kwargs.final_decay == 0.99  # defaults are on record


# --- options


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("proj_output_dims", 8, "did you mean 'proj_output_dim'"),
        ("proj_output_dim", "wide", "method_kwargs.proj_output_dim"),
        ("mu", -1.0, "mu: -1.0 is not allowed"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    name: str, key: str, value: object, message: str, images: Path
):
    with pytest.raises(IECLError, match=message) as error:
        cfg = config(name, images, **{f"method_kwargs__{key}": value})
        complete_objective(cfg)
        build_model(cfg, HOST)
    assert "\n" not in str(error.value)


def test_options_reach_the_loss(images: Path):
    kwargs = {"proj_hidden_dim": 24, "proj_output_dim": 12, "base_decay": 0.5, "mu": 7}
    model = build("minc", images, method_kwargs=kwargs)
    assert (model.minc.loss.base_decay, model.minc.loss.final_decay) == (0.5, 0.99)
    assert model.minc.loss.mu == 7.0
    assert [m.out_features for m in model.projector if isinstance(m, nn.Linear)] == [24, 12]


if HOST.name != "main":

    @pytest.mark.parametrize("name", METHODS)
    def test_argument_parser_of_1_0_2_has_every_option(name: str):
        parser = argparse.ArgumentParser(conflict_handler="resolve")
        parser = HOST.methods[name].add_model_specific_args(parser)
        args = parser.parse_args(["--optimizer", "sgd", "--proj_output_dim", "32", "--mu", "5"])
        assert (args.proj_output_dim, args.mu) == (32, 5.0)
        assert args.proj_hidden_dim == SpectralConfig.proj_hidden_dim
        assert (getattr(args, "final_decay", None) == 0.99) == (name == "minc")
