"""Each patch mends a fault that is really there, and nothing where there is none.

``step_through`` applies the patches one at a time, in a process of its own, and tries before and
after each what it is for. It runs on whichever host is importable: a patch whose fault this host
has not must find nothing, and what it is for must work without it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from iecl_solo.patches.checkpoints import make_plain, plain
from iecl_solo.patches.configuration import device_count
from iecl_solo.patches.imports import strtobool
from iecl_solo.patches.no_cuda import NO_CUDA
from iecl_solo.patches.patch import Stage
from iecl_solo.patches.schedule import LinearWarmupCosineAnnealingLR
from iecl_solo.patches.trainer import modern
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from iecl_solo import patches

ROOT = Path(__file__).parents[2]

# --- a small model of either host --------------------------------------------------------------


class TinyResNet(nn.Module):
    """What both hosts take for a torchvision ResNet, small enough for a test."""

    inplanes = 8

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc: nn.Module = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))


_OPTIONS: dict[str, Any] = {
    "proj_hidden_dim": 16,
    "proj_output_dim": 8,
    "pred_hidden_dim": 16,
    "temperature": 0.2,
    "queue_size": 32,
    "num_prototypes": 6,
    "warmup_teacher_temperature_epochs": 0,
    "warmup_teacher_temperature": 0.04,
    "student_temperature": 0.1,
    "teacher_temperature": 0.07,
    "temperature_q": 0.1,
    "temperature_k": 0.04,
    "lamb": 0.005,
    "scale_loss": 0.1,
    "sim_loss_weight": 25.0,
    "var_loss_weight": 25.0,
    "cov_loss_weight": 1.0,
    "clip_grad": 0,
    "freeze_last_layer": 1,
    "norm_last_layer": True,
    "use_bn_in_head": False,
    "sk_iters": 3,
    "sk_epsilon": 0.05,
    "freeze_prototypes_epochs": 1,
    "epoch_queue_starts": 1,
    "kmeans_iters": 2,
    "iternorm": False,
    "whitening_iters": 1,
    "whitening_size": 8,
    "whitening_eps": 0.0,
    "supervised": False,
}
_OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "deepclusterv2": {"num_prototypes": [6, 6]},
    "wmse": {"proj_output_dim": 2},
    "mae": {"mask_ratio": 0.5, "decoder_embed_dim": 16, "decoder_depth": 1, "norm_pix_loss": False},
}


def _takes_cfg() -> bool:
    return hasattr(importlib.import_module("solo.methods.base").BaseMethod, "_BACKBONES")


def build(name: str, *, epochs: int = 2, adamw: bool = False, knn: bool = False) -> Any:
    """A method of the host with a tiny backbone, whatever its generation."""
    methods = importlib.import_module("solo.methods").METHODS
    options = _OPTIONS | _OWN_OPTIONS.get(name, {})
    if not _takes_cfg():
        torchvision: Any = importlib.import_module("torchvision.models")
        resnet, torchvision.resnet18 = torchvision.resnet18, TinyResNet
        try:
            return methods[name](
                encoder="resnet18",
                num_classes=10,
                backbone_args={"cifar": False},
                max_epochs=epochs,
                batch_size=8,
                optimizer="adamw" if adamw else "sgd",
                lars=False,
                lr=0.01,
                weight_decay=1e-4,
                classifier_lr=0.01,
                exclude_bias_n_norm=False,
                accumulate_grad_batches=1,
                extra_optimizer_args={"betas": (0.9, 0.99)} if adamw else {"momentum": 0.9},
                scheduler="warmup_cosine",
                min_lr=0.0,
                warmup_start_lr=0.001,
                warmup_epochs=2,
                num_large_crops=2,
                num_small_crops=0,
                base_tau_momentum=0.9,
                final_tau_momentum=1.0,
                momentum_classifier=True,
                knn_eval=knn,
                knn_k=2,
                **options,
            )
        finally:
            torchvision.resnet18 = resnet
    backbone: dict[str, Any] = {"name": "resnet18"}
    if name == "mae":
        backbone = {"name": "vit_tiny", "kwargs": {"img_size": 16, "patch_size": 8}}
        options["decoder_num_heads"] = 2
    kwargs = {"betas": [0.9, 0.99]} if adamw else {"momentum": 0.9}
    cfg = {
        "name": name,
        "method": name,
        "backbone": backbone,
        "data": {
            "dataset": "custom",
            "num_classes": 10,
            "num_large_crops": 2,
            "num_small_crops": 0,
        },
        "optimizer": {
            "name": "adamw" if adamw else "sgd",
            "batch_size": 8,
            "lr": 0.01,
            "classifier_lr": 0.1,
            "weight_decay": 1e-4,
            "kwargs": kwargs,
        },
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1, "interval": "epoch"},
        "max_epochs": epochs,
        "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": True},
        "method_kwargs": options,
        "knn_eval": {"enabled": knn, "k": 2},
    }
    backbones = methods["base"]._BACKBONES
    resnet, backbones["resnet18"] = backbones["resnet18"], TinyResNet
    try:
        return methods[name](OmegaConf.create(cfg))
    finally:
        backbones["resnet18"] = resnet


def _images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def train_loader(n: int = 16) -> Any:
    """Batches of 8 in the host's layout: indices, two crops, labels."""
    x, y = _images(2 * n, 0), torch.arange(n) % 10
    return DataLoader([(i, (x[i], x[n + i]), y[i]) for i in range(n)], batch_size=8)  # type: ignore[arg-type]


def val_loader(n: int = 12) -> Any:
    """Batches of 8 images and labels; the last one is smaller."""
    x, y = _images(n, 1), torch.arange(n) % 10
    return DataLoader([(x[i], y[i]) for i in range(n)], batch_size=8)  # type: ignore[arg-type]


def trainer(**settings: Any) -> Trainer:
    """A quiet Trainer on one CPU."""
    quiet: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**quiet | settings)


# --- what each patch is for: raises while the fault is there ------------------------------------


def try_simclr() -> None:
    trainer().fit(build("simclr"), train_loader(), val_loader())


def try_momentum() -> None:
    trainer().fit(build("byol"), train_loader())


def try_dino() -> None:
    trainer().fit(build("dino"), train_loader())


def try_wmse() -> None:
    trainer().fit(build("wmse"), train_loader())


def try_knn() -> None:
    fitted = trainer()
    fitted.fit(build("simclr", knn=True), train_loader(), val_loader())
    assert 0 <= fitted.callback_metrics["val_knn_acc1"] <= 100


def try_command_line() -> None:
    if importlib.util.find_spec("solo.args.setup") is None:
        return
    setup = importlib.import_module("solo.args.setup")
    line = "--dataset cifar10 --encoder resnet18 --data_dir . --gpus 0,1 --precision 16 "
    line += "--optimizer sgd --lr 0.3 --batch_size 64 --method dino --norm_last_layer false "
    line += "--brightness 0.4 --contrast 0.4 --saturation 0.2 --hue 0.1 --gaussian_prob 0 "
    line += "--solarization_prob 0 --max_epochs 7"
    argv, sys.argv = sys.argv, ["pretrain.py", *line.split()]
    try:
        args = setup.parse_args_pretrain()
    finally:
        sys.argv = argv
    assert args.lr == pytest.approx(0.3 * 64 * 2 / 256) and not args.norm_last_layer
    assert (args.gpus, args.precision, args.max_epochs) == ([0, 1], 16, 7)


def try_umap() -> None:
    callback = importlib.import_module("solo.utils.auto_umap").AutoUMAP
    name: Any = "run" if _takes_cfg() else argparse.Namespace(name="run")
    folder = Path("umap")
    trainer(callbacks=[callback(name, folder)]).fit(build("simclr"), train_loader(), val_loader())
    assert list(folder.rglob("*.pdf"))


def try_lars() -> None:
    lars = importlib.import_module("solo.utils.lars")
    weight = _after_one_step(lars)
    assert weight == pytest.approx(_lars_by_hand()), f"the weight is {weight}"


def try_checkpoint() -> None:
    for name, adamw in [("simsiam", False), ("simclr", True)]:
        fitted = trainer()
        fitted.fit(build(name, adamw=adamw), train_loader())
        fitted.save_checkpoint("try.ckpt")
        torch.load("try.ckpt", weights_only=True)


def try_resuming() -> None:
    fitted = trainer()
    fitted.fit(build("swav"), train_loader())
    fitted.save_checkpoint("resume.ckpt")
    trainer(max_epochs=2).fit(build("swav"), train_loader(), ckpt_path="resume.ckpt")


def resumed_byol(at_each_update: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """A BYOL to be resumed, and the list of what is read off it at its momentum's updates."""
    model, found = build("byol"), []
    update = model.momentum_updater.update

    def recording(*pair: Any) -> None:
        found.append(at_each_update(model))
        update(*pair)

    model.momentum_updater.update = recording
    return model, found


def try_momentum_rate() -> None:
    fitted = trainer()
    fitted.fit(build("byol"), train_loader())
    fitted.save_checkpoint("momentum.ckpt")
    model: Any = fitted.lightning_module
    resumed, rates = resumed_byol(lambda m: m.momentum_updater.cur_tau)
    trainer(max_epochs=2).fit(resumed, train_loader(), ckpt_path="momentum.ckpt")
    reached = model.momentum_updater.cur_tau
    assert rates[0] == reached, f"went on at {rates[0]}, not {reached}"


def try_momentum_step() -> None:
    """An update of the momentum network for each step of the optimiser, also after a resume."""
    halves = {"accumulate_grad_batches": 2}  # two batches are an epoch
    fitted = trainer(**halves)
    fitted.fit(build("byol"), train_loader())
    fitted.save_checkpoint("halves.ckpt")
    resumed, steps = resumed_byol(lambda m: m.trainer.global_step)
    trainer(max_epochs=2, **halves).fit(resumed, train_loader(), ckpt_path="halves.ckpt")
    assert set(steps) == {2}, f"updated at step {min(steps)}, before the next one"


def try_devices() -> None:
    if importlib.util.find_spec("solo.args.pretrain") is None:
        return
    for module in ("solo.args.pretrain", "solo.args.linear"):
        parse_cfg = importlib.import_module(module).parse_cfg
        parsed = parse_cfg(_cfg_for_devices(2, "gpu"))
        assert parsed.devices == 2 and parsed.optimizer.lr == pytest.approx(0.5)
        for accelerator in ("cpu", "cpu" if torch.cuda.is_available() else "auto"):
            on_cpu = parse_cfg(_cfg_for_devices([0], accelerator))
            assert trainer(devices=on_cpu.devices, accelerator=accelerator).num_devices == 1
        assert parse_cfg(_cfg_for_devices([0, 3], "gpu")).devices == [0, 3]


def _cfg_for_devices(devices: Any, accelerator: str) -> Any:
    cfg = {
        "name": "test",
        "method": "simclr",
        "backbone": {"name": "resnet18"},
        "data": {"dataset": "cifar10", "train_path": ".", "val_path": "."},
        "augmentations": [{"crop_size": 32, "num_crops": 2}],
        "optimizer": {"name": "sgd", "batch_size": 64, "lr": 1.0, "classifier_lr": 1.0},
        "checkpoint": {"enabled": False},
        "auto_resume": {"enabled": False},
        "pretrained_feature_extractor": "none.ckpt",
        "devices": devices,
        "accelerator": accelerator,
    }
    return OmegaConf.create(cfg)


class _OneWeight(LightningModule):
    """Loss: the sum of a matrix of ones, under LARS with weight decay 0.5 and eta 0.1."""

    def __init__(self, lars: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.lars = lars

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        if hasattr(self.lars, "LARSWrapper"):
            sgd = torch.optim.SGD([self.weight], lr=1.0, weight_decay=0.5)
            return self.lars.LARSWrapper(sgd, eta=0.1)
        return self.lars.LARS([self.weight], lr=1.0, weight_decay=0.5, eta=0.1)


def try_two_classes() -> None:
    """What linear evaluation asks in every step, of data of two classes."""
    linear = importlib.import_module("solo.methods.linear")
    logits, labels = torch.eye(2), torch.tensor([0, 0])
    first, fifth = linear.accuracy_at_k(logits, labels, top_k=(1, 5))
    assert (float(first), float(fifth)) == (50.0, 100.0)


def _after_one_step(lars: Any) -> float:
    model = _OneWeight(lars)
    trainer(max_steps=1).fit(model, DataLoader([0], batch_size=None))  # type: ignore[arg-type]
    assert model.weight.detach().unique().numel() == 1
    return model.weight[0, 0].item()


def _lars_by_hand() -> float:
    weight_norm, gradient_norm, decay, eta = 2.0, 2.0, 0.5, 0.1
    local_rate = eta * weight_norm / (gradient_norm + decay * weight_norm)
    return 1.0 - local_rate * (1.0 + decay * 1.0)


# name of a patch: (what it is for, what the fault says, whether each host has it: 1.0.2, main)
FAULTS: dict[str, tuple[Callable[[], None], str, bool, bool]] = {
    "one-lightning": (try_simclr, "must be a `LightningModule`", True, False),
    "warmup-cosine-schedule": (try_simclr, "pl_bolts", True, False),
    "distutils": (try_simclr, "distutils", True, False),
    "validation-epoch-end": (try_simclr, "validation_epoch_end", True, False),
    "train-batch-end": (try_momentum, "dataloader_idx", True, False),
    "clip-gradients": (try_dino, "gradient_clip_val", True, False),
    "trainer-arguments": (try_command_line, "add_argparse_args", True, False),
    "umap-loaders": (try_umap, "not subscriptable", True, False),
    "whitening": (try_wmse, "cholesky", True, False),
    "lars-closure": (try_lars, "the weight is 0.0", True, False),
    "knn-metric": (try_knn, "compute_on_step", True, True),
    "few-classes": (try_two_classes, "out of range", True, True),
    "plain-checkpoints": (try_checkpoint, "functools.partial", True, True),
    "resumed-buffers": (try_resuming, "Unexpected key(s)", True, True),
    "momentum-rate": (try_momentum_rate, "went on at 0.9,", True, True),
    "momentum-step": (try_momentum_step, "updated at step 1,", True, True),
    "device-count": (try_devices, "len()", False, True),
}


# --- one patch at a time, in a process of its own ----------------------------------------------


class _NoDistutils:
    """Python 3.12 or later without setuptools."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "distutils":
            raise ModuleNotFoundError("No module named 'distutils'")


def _offer_quick_umap() -> None:
    # compiling the real one takes longer than all tests
    class UMAP:
        def __init__(self, n_components: int) -> None:
            pass

        def fit_transform(self, data: Any) -> Any:
            return data[:, :2]

    umap = types.ModuleType("umap")
    umap.UMAP = UMAP  # type: ignore[attr-defined]
    sys.modules["umap"] = umap


def _outcome(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


def _import_anew() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "solo"]:
        del sys.modules[name]
    importlib.import_module("solo")


def step_through() -> dict[str, list[str]]:
    """For each patch: how things are without it, whether it was applied, how they are with it."""
    _offer_quick_umap()
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_SoloFinder"]
    sys.meta_path.insert(0, _NoDistutils())
    for name in [n for n in sys.modules if n.split(".")[0] == "distutils"]:
        del sys.modules[name]
    every = {patch.name: patch for patch in patches.PATCHES}
    solo_dir = Path(str(importlib.util.find_spec("solo").origin)).parent  # type: ignore[union-attr]
    patches.PATCHES.clear()
    found: dict[str, list[str]] = {}

    # without the schedule it cannot be imported; the others can then be told from each other
    order = ["warmup-cosine-schedule", "distutils", "one-lightning"]
    for name in order:
        without = _outcome(_import_anew)
        if without == "works" and name == "one-lightning":
            without = _outcome(try_simclr)
            without = "works" if "validation_epoch_end" in without else without
        patches.PATCHES.append(every[name])
        patches.before_import(solo_dir)
        found[name] = [without, str(name in _applied()), ""]
    _import_anew()
    for name, patch in every.items():
        if patch.stage is Stage.AFTER_IMPORT:
            attempt = FAULTS[name][0]
            without = _outcome(attempt)
            patches.PATCHES.append(patch)
            patches.after_import()
            found[name] = [without, str(name in _applied()), _outcome(attempt)]
    for name in order:
        found[name][2] = _outcome(FAULTS[name][0])
    return found


def _applied() -> list[str]:
    return [mended.name for mended in patches.applied()]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """``step_through`` in a fresh Python."""
    folder = tmp_path_factory.mktemp("steps")
    script = "import json, test_patches as t; f = t.step_through(); print('\\n' + json.dumps(f))"
    path = os.pathsep.join(
        [
            str(Path(__file__).parent),
            str(ROOT / "tests"),
            str(ROOT),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_patch_is_tried() -> None:
    tried = [patch.name for patch in patches.PATCHES if patch.stage is not Stage.SCRIPT]
    assert sorted(tried) == sorted(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_patch_mends_its_fault_and_only_that(outcomes: dict[str, list[str]], name: str) -> None:
    without, was_applied, with_it = outcomes[name]
    _, symptom, in_102, in_main = FAULTS[name]
    assert with_it == "works"
    if in_main if _takes_cfg() else in_102:
        assert symptom in without
        assert was_applied == "True"
    else:
        assert without == "works"
        assert was_applied == "False"


def test_applied_says_what_and_why() -> None:
    importlib.import_module("solo")
    patches.after_import()
    names = [mended.name for mended in patches.applied()]
    assert names == [patch.name for patch in patches.PATCHES if patch.name in names]
    assert "knn-metric" in names
    assert all(mended.why for mended in patches.applied())


def test_a_second_call_changes_nothing() -> None:
    knn = importlib.import_module("solo.utils.knn").WeightedKNNClassifier
    patches.after_import()
    bases, names = knn.__bases__, patches.applied()
    patches.after_import()
    assert knn.__bases__ == bases
    assert patches.applied() == names


# --- every method ------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each method that is the host's own."""
    if "method" in metafunc.fixturenames:
        methods = importlib.import_module("solo.methods").METHODS
        own = [n for n, cls in methods.items() if cls.__module__ == f"solo.methods.{n}"]
        metafunc.parametrize("method", [n for n in own if n not in ("base", "linear")])


def test_every_method_trains_and_its_checkpoint_is_plain(method: str, tmp_path: Path) -> None:
    fitted, model = trainer(), build(method, knn=True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fitted.fit(model, train_loader(), val_loader())
    assert fitted.global_step == 2
    assert any(not torch.equal(weight, before[n]) for n, weight in model.named_parameters())
    assert torch.isfinite(fitted.callback_metrics["val_loss"])
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    loaded = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert loaded["state_dict"].keys() == model.state_dict().keys()
    assert len(loaded["optimizer_states"]) == len(loaded["lr_schedulers"]) == 1


def test_the_linear_probe_trains_and_its_checkpoint_is_plain(tmp_path: Path) -> None:
    probe = importlib.import_module("solo.methods.linear").LinearModel
    backbone = TinyResNet()
    backbone.fc = nn.Identity()
    if _takes_cfg():
        optimizer = {"name": "adamw", "batch_size": 8, "lr": 0.1, "weight_decay": 0.0}
        cfg = {
            "data": {"num_classes": 10},
            "max_epochs": 1,
            "optimizer": optimizer | {"kwargs": {"betas": [0.9, 0.99]}},
            "scheduler": {"name": "warmup_cosine", "interval": "epoch", "warmup_start_lr": 0.01},
        }
        model = probe(backbone, OmegaConf.create(cfg))
    else:
        model = probe(
            backbone,
            num_classes=10,
            max_epochs=1,
            batch_size=8,
            optimizer="sgd",
            lars=True,
            lr=0.1,
            weight_decay=0.0,
            exclude_bias_n_norm=True,
            extra_optimizer_args={"momentum": 0.9},
            scheduler="cosine",
        )
    before, fitted = model.classifier.weight.detach().clone(), trainer(num_sanity_val_steps=1)
    fitted.fit(model, val_loader(), val_loader())
    assert not torch.equal(model.classifier.weight, before)
    assert torch.isfinite(fitted.callback_metrics["val_loss"])
    fitted.save_checkpoint(tmp_path / "probe.ckpt")
    state = torch.load(tmp_path / "probe.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["classifier.weight"], model.classifier.weight)


# --- resuming ----------------------------------------------------------------------------------


class _SaveAndSeed(Callback):
    """Saves where the hosts' own Checkpointer does, and draws the same numbers in each step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(str(self.path).format(trainer.current_epoch))


def _trained(name: str, path: Path, ckpt: str | None, seed: int) -> Any:
    """The Trainer of a run of four epochs, and the rate of every step."""
    seed_everything(seed, verbose=False)
    fitted, rates = trainer(max_epochs=4, callbacks=[_SaveAndSeed(path)]), []
    model = build(name, epochs=4)
    step = model.training_step

    def recording(*args: Any) -> Any:
        rates.append([group["lr"] for group in fitted.optimizers[0].param_groups])
        return step(*args)

    model.training_step = recording
    fitted.fit(model, train_loader(), ckpt_path=ckpt)
    return fitted, rates


def test_resuming_continues_exactly(method: str, tmp_path: Path) -> None:
    whole, rates = _trained(method, tmp_path / "whole-{}.ckpt", None, seed=0)
    half = str(tmp_path / "whole-1.ckpt")
    resumed, later_rates = _trained(method, tmp_path / "resumed-{}.ckpt", half, seed=1)

    assert whole.global_step == resumed.global_step == len(rates) == 8
    assert later_rates == rates[4:]
    assert rates[4] != rates[6]  # a rate that stood still would also be equal
    expected, got = (run.lightning_module.state_dict() for run in (whole, resumed))
    assert [k for k in expected if not torch.equal(expected[k], got[k])] == []


def test_a_checkpoint_of_an_unmended_run_resumes_with_a_moving_rate() -> None:
    weight = nn.Parameter(torch.zeros(()))
    scheduler = LinearWarmupCosineAnnealingLR(torch.optim.SGD([weight], lr=1.0), 1, 5)
    scheduler.get_lr = lambda: [0.5]
    checkpoint: Any = {"state_dict": {}, "lr_schedulers": [scheduler.state_dict()]}
    assert "get_lr" in checkpoint["lr_schedulers"][0]
    build("simsiam").on_load_checkpoint(checkpoint)
    assert "get_lr" not in checkpoint["lr_schedulers"][0]
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [1.0]


def test_make_plain_keeps_what_is_plain() -> None:
    moment = torch.ones(2)
    groups: Any = [{"lr": 0.1, "betas": OmegaConf.create([0.9, 0.99]), "params": [0]}]
    optimizer: Any = {"state": {0: {"exp_avg": moment}}, "param_groups": groups}
    checkpoint: Any = {
        "epoch": 3,
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"f": len, "n": 2}],
    }
    make_plain(checkpoint)
    assert checkpoint["epoch"] == 3
    assert checkpoint["lr_schedulers"] == [{"n": 2}]
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert type(group["betas"]) is list and group["betas"] == [0.9, 0.99]
    assert checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] is moment
    assert OmegaConf.is_list(groups[0]["betas"])  # the optimiser's own stays as it was
    assert plain((1, {"a": OmegaConf.create({"b": 2})})) == (1, {"a": {"b": 2}})


# --- validation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_validation_averages_over_its_own_epoch_only(name: str) -> None:
    model, seen = build(name), []
    step = model.validation_step

    def recording(*args: Any) -> Any:
        out = step(*args)
        if not model.trainer.sanity_checking:
            seen.append(out[0] if isinstance(out, tuple) else out)
        return out

    model.validation_step = recording
    fitted = trainer(max_epochs=2, num_sanity_val_steps=1)
    fitted.fit(model, train_loader(), val_loader(12))
    last = seen[2:]
    assert [out["batch_size"] for out in last] == [8, 4]
    mean = sum(out["val_loss"].item() * out["batch_size"] for out in last) / 12
    assert fitted.callback_metrics["val_loss"].item() == pytest.approx(mean, rel=1e-5)


def test_a_subclass_may_define_the_old_hook() -> None:
    simclr = importlib.import_module("solo.methods").METHODS["simclr"]

    class Counting(simclr):  # type: ignore[misc, valid-type]
        def validation_epoch_end(self, outs: list[Any]) -> None:
            self.batches = len(outs)
            super().validation_epoch_end(outs)

    model = build("simclr")
    model.__class__ = Counting
    fitted = trainer(num_sanity_val_steps=1)
    if _takes_cfg():  # Lightning 2's own hook is what that host has
        with pytest.raises(NotImplementedError, match="validation_epoch_end"):
            fitted.fit(model, train_loader(), val_loader())
    else:
        fitted.fit(model, train_loader(), val_loader())
        assert model.batches == 2
        assert "val_loss" in fitted.callback_metrics


# --- k-nn --------------------------------------------------------------------------------------


def test_the_knn_metric_collects_until_it_is_asked() -> None:
    knn = importlib.import_module("solo.utils.knn").WeightedKNNClassifier(
        k=1, distance_fx="euclidean"
    )
    train, labels = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0, 1])
    for half in (slice(0, 2), slice(2, 4)):
        assert knn(train_features=train[half], train_targets=labels[half]) is None
    test, wanted = torch.tensor([[0.1], [0.9], [2.1], [2.8]]), torch.tensor([0, 1, 0, 0])
    assert knn(test_features=test, test_targets=wanted) is None
    nearest = [labels[min(range(4), key=lambda i: abs(train[i, 0] - x))] for x in test[:, 0]]
    right = sum(int(a == b) for a, b in zip(nearest, wanted, strict=True))
    assert knn.compute()[0] == pytest.approx(100 * right / 4)


# --- the schedule ------------------------------------------------------------------------------


def _rates_by_hand(
    peak: float, warmup: int, epochs: int, start: float, low: float, n: int
) -> list[float]:
    """Step by step: equal increments up, then equal angles down the cosine."""
    rates = []
    if warmup == 1:
        rates.append(start)
    elif warmup > 1:
        increment = (peak - start) / (warmup - 1)
        rate = start
        for _ in range(warmup):
            rates.append(rate)
            rate += increment
    angle = 0.0
    while len(rates) < n:
        rates.append(low + (peak - low) * math.cos(angle / 2) ** 2)
        angle += math.pi / (epochs - warmup)
    return rates[:n]


def _optimizer(*peaks: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(()))], "lr": peak} for peak in peaks]
    return torch.optim.SGD(groups)


def _run(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
@pytest.mark.parametrize(("start", "low"), [(0.0, 0.0), (0.003, 0.01)])
def test_schedule_is_the_one_by_hand(warmup: int, start: float, low: float) -> None:
    optimizer = _optimizer(0.3, 2.0)
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, warmup, 12, start, low)
    rates = _run(optimizer, scheduler, 13)
    for i, peak in enumerate((0.3, 2.0)):
        by_hand = _rates_by_hand(peak, warmup, 12, start, low, 13)
        assert [rate[i] for rate in rates] == pytest.approx(by_hand)
    assert rates[12] == pytest.approx([low, low])


def test_schedule_shorter_than_its_warm_up() -> None:
    optimizer = _optimizer(1.0)
    rates = _run(optimizer, LinearWarmupCosineAnnealingLR(optimizer, 10, 10), 11)
    assert rates[10] == [1.0]
    assert [rate[0] for rate in rates[:10]] == pytest.approx([i / 9 for i in range(10)])


def test_schedule_whose_rates_are_replaced() -> None:
    """What the host does for a predictor: its group keeps its rate, the others follow."""
    static_lr = importlib.import_module("solo.methods.base").static_lr
    optimizer, free = _optimizer(0.3, 2.0), _optimizer(0.3)
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, 2, 6)
    get_lr = scheduler.get_lr
    scheduler.get_lr = lambda: static_lr(get_lr, [1], [2.0])
    rates = _run(optimizer, scheduler, 7)
    alone = _run(free, LinearWarmupCosineAnnealingLR(free, 2, 6), 7)
    assert [rate[0] for rate in rates] == [rate[0] for rate in alone]
    assert [rate[1] for rate in rates[1:]] == [2.0] * 6
    assert scheduler.base_lrs == [0.3, 2.0]


def test_schedule_resumes_from_its_state() -> None:
    optimizer = _optimizer(0.3)
    whole = _run(optimizer, LinearWarmupCosineAnnealingLR(optimizer, 3, 10), 10)
    optimizer = _optimizer(0.3)
    first = LinearWarmupCosineAnnealingLR(optimizer, 3, 10)
    begun = _run(optimizer, first, 5)
    again = _optimizer(0.3)
    second = LinearWarmupCosineAnnealingLR(again, 3, 10)
    again.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert begun + _run(again, second, 5) == whole


# --- the rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "accelerator", "count"),
    [
        ([0], "gpu", 1),
        (OmegaConf.create([0, 3]), "gpu", 2),
        (4, "cpu", 4),
        ("4", "gpu", 4),
        ("0,1", "gpu", 2),
        ("auto", "cpu", 1),
        (-1, "cpu", 1),
    ],
)
def test_device_count(devices: Any, accelerator: str, count: int) -> None:
    assert device_count(devices, accelerator) == count


@pytest.mark.parametrize("gpus", [1, 8])
def test_all_devices_are_counted(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_count(-1, "gpu") == device_count("auto", "auto") == gpus
    assert device_count("auto", "cpu") == 1


@pytest.mark.parametrize(
    ("old", "cuda", "new"),
    [
        ({"gpus": [1]}, True, {"accelerator": "gpu", "devices": [1]}),
        ({"gpus": [0, 1]}, False, {"devices": 2}),
        ({"distributed_backend": "ddp"}, True, {"strategy": "ddp"}),
        ({"accelerator": "ddp"}, True, {"strategy": "ddp"}),
        ({"accelerator": "cpu", "max_epochs": 3}, True, {"accelerator": "cpu", "max_epochs": 3}),
        ({"checkpoint_callback": False}, True, {"enable_checkpointing": False}),
    ],
)
def test_old_trainer_arguments(old: dict[str, Any], cuda: bool, new: dict[str, Any]) -> None:
    assert modern(old, cuda) == new


@pytest.mark.parametrize("word", ["yes", "True", "1", "on", "T"])
def test_strtobool_says_yes(word: str) -> None:
    assert strtobool(word) == 1


@pytest.mark.parametrize("word", ["no", "False", "0", "off", "F"])
def test_strtobool_says_no(word: str) -> None:
    assert strtobool(word) == 0


def test_strtobool_refuses_anything_else() -> None:
    with pytest.raises(ValueError, match="maybe"):
        strtobool("maybe")


def test_cuda_is_left_alone_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not NO_CUDA.present(Path())


def test_without_cuda_a_script_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for movable in (torch.Tensor, nn.Module):
        for name in ("cuda", "to"):
            monkeypatch.setattr(movable, name, getattr(movable, name))
    monkeypatch.setattr(patches, "_applied", dict(patches._applied))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).to("cuda:99")
    with pytest.warns(UserWarning, match="no CUDA device"):
        patches.for_script()
    assert "no-cuda" in [mended.name for mended in patches.applied()]

    x, layer = torch.ones(2), nn.Linear(2, 2)
    assert x.cuda(non_blocking=True) is x
    assert layer.cuda() is layer
    assert x.to("cuda:99").device.type == "cpu"
    assert x.to(device=torch.device("cuda:0"), dtype=torch.float64).dtype is torch.float64
    assert x.to(torch.int64).dtype is torch.int64
    assert layer.to("cuda:0").weight.device.type == "cpu"
    assert layer.to(torch.float64).weight.dtype is torch.float64
