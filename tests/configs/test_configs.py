"""The packaged configurations: all compose, and each builds what it says on the host."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import iecl_solo.configs
import pytest
import torch
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from support import HOST
from torch import nn

from iecl_solo.errors import IECLError
from iecl_solo.objectives.climb import CLIMBConfig
from iecl_solo.objectives.iecl import IECLConfig
from iecl_solo.solo.build import build_model
from iecl_solo.solo.config import parse_block
from iecl_solo.solo.registry import OBJECTIVES, check_method, split_method
from iecl_solo.solo.settings import prepare_pretrain
from iecl_solo.solo.wrapper import find_embedder, objectives
from iecl_solo.train.packaged import packaged_configs

ROOT = Path(iecl_solo.configs.__file__).parent
DATASETS = ("digits", "cifar", "stl10", "imagenet-100", "imagenet", "custom", "small", "minimal")
#: Sets for a folder of images of one's own.
OWN = ("custom", "small", "minimal")
METHODS = (
    *("simclr", "mocov2plus", "byol", "simsiam", "mocov3", "spectral", "minc", "dino"),
    *("vicreg", "barlow_twins"),
)
CONFIGS = {objective.name: objective.Config for objective in OBJECTIVES}


PRETRAIN = packaged_configs("pretrain")
#: Hosts of every data set. A variant's configuration is its host's and the objective's (tested
#: below), so it is built for one set of small images and one of large ones.
BUILT = [
    name
    for name in PRETRAIN
    if not name.startswith("minimal/")
    and (not split_method(name.rpartition("/")[2])[0] or name.startswith(("digits/", "custom/")))
]
# the default takes all of that from the checkpoint
LINEAR = [name for name in packaged_configs("linear") if name != "default"]
PRESETS = packaged_configs("iecl")


def composed(name: str, *overrides: str) -> DictConfig:
    return copy.deepcopy(_composed(name, *overrides))


@cache
def _composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("iecl_solo.configs", version_base="1.2"):
        return compose(name, overrides=list(overrides))


def given(name: str) -> list[str]:
    """What only the user can say."""
    return ["data.train_path=train"] if name.split("/")[0] in OWN else []


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Everything resolved; a key without a value is an error."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def test_every_data_set_has_every_method_and_its_variant() -> None:
    methods = [*METHODS, *(f"{name}_{m}" for name in CONFIGS for m in METHODS)]
    assert set(PRETRAIN) == {f"{d}/{m}" for d in DATASETS for m in methods}
    assert set(LINEAR) == {*DATASETS} - {"small", "minimal"}  # a folder of images: custom


def test_no_variant_is_a_file() -> None:
    written = [p.stem for p in (ROOT / "pretrain").rglob("*.yaml")]
    assert sorted(set(written)) == sorted({*METHODS, "base"})
    assert set(iecl_solo.configs.objectives()) == set(CONFIGS)
    with pytest.raises(MissingConfigException):
        composed("pretrain/cifar/iecl_base")


def test_a_variant_of_two_objectives_has_both_blocks() -> None:
    cfg = composed("pretrain/cifar/iecl_climb_byol", "iecl=none", "+climb.max_concentration=3")
    assert cfg.method == "iecl_climb_byol" and cfg.iecl.placement == "none"
    assert cfg.climb.max_concentration == 3


def test_hydra_lists_the_variants(tmp_path: Path) -> None:
    """A user's own YAML stands on one, a misspelt one is told with the names there are."""
    (tmp_path / "mine.yaml").write_text("defaults: [/pretrain/digits/iecl_byol, _self_]\nseed: 8\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        cfg = compose("mine")
    assert (cfg.method, cfg.seed) == ("iecl_byol", 8)
    (tmp_path / "mine.yaml").write_text("defaults: [/pretrain/digits: iecl_byoll]\n")
    with (
        initialize_config_dir(str(tmp_path), version_base="1.2"),
        pytest.raises(MissingConfigException, match="iecl_byol\n"),
    ):
        compose("mine")


def test_custom_takes_little_for_granted() -> None:
    for name in METHODS:
        cfg = plain(composed(f"pretrain/custom/{name}", "data.train_path=mine"))
        assert cfg["optimizer"]["name"] == "sgd" and cfg["optimizer"]["batch_size"] <= 64
        assert cfg["method_kwargs"].get("queue_size", 0) <= 4096
        assert all(a["rrc"]["crop_min_scale"] >= 0.2 for a in cfg["augmentations"])
        assert cfg["data"]["val_path"] is None and cfg["data"]["image_size"] == 224


@pytest.mark.any_host
@pytest.mark.parametrize("name", PRETRAIN)
def test_pretrain_composes(name: str) -> None:
    cfg = plain(composed(f"pretrain/{name}", *given(name)))
    folder, _, method = name.partition("/")
    dataset = {"digits": "custom", "cifar": "cifar10", "imagenet-100": "imagenet100"}
    dataset |= dict.fromkeys(OWN, "custom")
    assert cfg["method"] == method
    assert cfg["data"]["dataset"] == dataset.get(folder, folder)
    assert cfg["name"].startswith(f"{method}-")
    assert cfg["devices"] == [0]  # what len() in main's parse_cfg needs
    assert cfg["scheduler"]["name"] == "warmup_cosine"
    assert {"name", "batch_size", "lr", "classifier_lr", "weight_decay"} <= set(cfg["optimizer"])
    assert isinstance(cfg["optimizer"]["weight_decay"], float)
    assert all(a["crop_size"] == cfg["data"]["image_size"] for a in cfg["augmentations"])
    assert sum(a["num_crops"] for a in cfg["augmentations"]) == 2
    assert cfg["data"]["image_size"] % IECLConfig().saib.build(32).patch_size == 0
    assert cfg["method_kwargs"].get("queue_size", 0) % cfg["optimizer"]["batch_size"] == 0
    one_network = ("simclr", "simsiam", "spectral", "vicreg", "barlow_twins")
    assert ("momentum" in cfg) == (split_method(method)[1] not in one_network)
    assert {"checkpoint", "auto_resume", "csv", "tensorboard", "wandb", "performance"} <= set(cfg)
    assert "hydra" not in cfg


@pytest.mark.any_host
@pytest.mark.parametrize("name", [n for n in PRETRAIN if split_method(n.rpartition("/")[2])[0]])
def test_a_variant_is_its_host_and_the_objective(name: str) -> None:
    folder, _, method = name.partition("/")
    (objective,), bare = split_method(method)
    variant = plain(composed(f"pretrain/{name}", *given(name)))
    host = plain(composed(f"pretrain/{folder}/{bare}", *given(name)))
    assert variant.pop("method") == f"{objective}_{host.pop('method')}"
    assert variant.pop("name") == f"{objective}_{host.pop('name')}"
    expected, written = CONFIGS[objective](), variant.pop(objective)
    if name.startswith("minimal/iecl_"):
        expected = parse_block("iecl", IECLConfig, composed("iecl/noise")["iecl"])
    assert parse_block(objective, CONFIGS[objective], written) == expected
    assert variant == host


@pytest.mark.parametrize("name", BUILT)
def test_pretrain_builds(name: str, images: Path) -> None:
    cfg = composed(f"pretrain/{name}", *given(name))
    cfg.data.train_path = cfg.data.val_path = str(images)
    cfg.optimizer.batch_size = 16
    carried, bare = split_method(cfg.method)
    if bare not in HOST.methods:
        with pytest.raises(IECLError, match=cfg.method):
            check_method(cfg.method)
        return
    check_method(cfg.method)
    lr, weight_decay = cfg.optimizer.lr, cfg.optimizer.weight_decay
    # a host is part of its variant, so on its own its layers' shapes are enough
    with torch.device("cpu" if carried else "meta"):
        model = build_model(prepare_pretrain(cfg, HOST), HOST)
    accumulated = cfg.get("accumulate_grad_batches", 1)
    assert model.lr == pytest.approx(lr * 16 / 256 * accumulated)
    assert model.weight_decay == weight_decay
    assert model.max_epochs == cfg.max_epochs
    embedder = model.get_submodule(find_embedder(model, "online"))
    linear = [m for m in embedder.modules() if isinstance(m, nn.Linear)]
    assert linear[0].out_features == cfg.method_kwargs.proj_hidden_dim
    assert linear[-1].out_features == cfg.method_kwargs.proj_output_dim
    assert list(objectives(model)) == carried
    stem = getattr(model, HOST.online).conv1
    small = name.startswith(("cifar/", "small/"))
    assert stem.kernel_size == ((3, 3) if small else (7, 7))


def test_default_preset_is_the_dataclass() -> None:
    written = plain(composed("iecl/default"))["iecl"]
    assert list(written) == ["beta", "lambda", "eta", "gamma", "generation", "saib"]
    assert parse_block("iecl", IECLConfig, written) == IECLConfig()


def test_few_augmentations_have_a_saib_with_noise() -> None:
    cfg = composed("pretrain/minimal/iecl_byol", "data.train_path=mine")
    noise = composed("pretrain/custom/iecl_byol", "data.train_path=mine", "iecl=noise")
    assert cfg.iecl == noise.iecl and cfg.iecl.saib.variant == "noise"
    assert {a.color_jitter.prob for a in cfg.augmentations} == {0.0}
    climb = composed("pretrain/minimal/climb_byol", "data.train_path=mine")
    assert climb.climb == composed("climb/default").climb and "iecl" not in climb


def test_presets_of_climb() -> None:
    assert set(packaged_configs("climb")) == {"default", "none"}
    written = plain(composed("climb/default"))["climb"]
    assert parse_block("climb", CLIMBConfig, written) == CLIMBConfig()
    cfg = composed("pretrain/digits/climb_simclr", "climb=none")
    assert parse_block("climb", CLIMBConfig, cfg.climb) == CLIMBConfig(beta=0)


def test_presets_keep_only_their_term() -> None:
    kept = {
        "default": ("query", {"beta", "lambda_", "eta", "gamma", "generation"}),
        "none": ("none", set()),
        "saib_only": ("query", {"gamma"}),
        "kl_only": ("query", {"beta"}),
        "generation_only": ("query", {"beta", "generation"}),
        "noise": ("query", {"lambda_"}),
        "minimal": ("query", {"lambda_"}),
        "entropy_only": ("none", {"lambda_"}),
        "regularizer_only": ("none", {"eta"}),
    }
    assert set(PRESETS) == set(kept)
    for preset, (placement, terms) in kept.items():
        cfg = composed("pretrain/digits/iecl_simclr", f"iecl={preset}")
        config = parse_block("iecl", IECLConfig, cfg.iecl)
        weights = _weights(config)
        assert config.saib.variant == ("noise" if preset in ("noise", "minimal") else "paper")
        assert config.placement == placement
        assert {t for t, weight in weights.items() if weight} == terms
        assert all(weights[t] == _weights(IECLConfig())[t] for t in terms)


def _weights(config: IECLConfig) -> dict[str, float]:
    weights = {t: getattr(config, t) for t in ("beta", "lambda_", "eta", "gamma")}
    return weights | {"generation": config.generation.weight}


def test_overrides() -> None:
    cfg = composed("pretrain/cifar/iecl_byol", "data=cifar100", "+iecl.saib.patch_size=8")
    assert (cfg.data.dataset, cfg.name) == ("cifar100", "iecl_byol-cifar100")
    assert parse_block("iecl", IECLConfig, cfg.iecl).saib.patch_size == 8
    cfg = composed("pretrain/custom/simclr", "data.train_path=mine", "data.image_size=64")
    assert [a.crop_size for a in cfg.augmentations] == [64]
    assert composed("linear/cifar", "data=cifar100").data.dataset == "cifar100"


def test_cifar_has_solo_learns_values() -> None:
    simclr = composed("pretrain/cifar/simclr")
    assert (simclr.optimizer.name, simclr.optimizer.lr, simclr.optimizer.kwargs.eta) == (
        "lars",
        0.4,
        0.02,
    )
    assert (simclr.optimizer.batch_size, simclr.max_epochs) == (256, 1000)
    byol = composed("pretrain/cifar/byol")
    assert (byol.optimizer.lr, byol.optimizer.weight_decay) == (1.0, 1e-5)
    assert [a.gaussian_blur.prob for a in byol.augmentations] == [0.0, 0.0]
    assert composed("pretrain/cifar/mocov2plus").method_kwargs.queue_size == 32768


@pytest.mark.parametrize("name", LINEAR)
def test_linear_composes_with_the_backbone_that_was_pretrained(name: str) -> None:
    cfg = plain(
        composed(f"linear/{name}", *given(f"{name}/"), "pretrained_feature_extractor=a.ckpt")
    )
    pretrained = plain(composed(f"pretrain/{name}/simclr", *given(f"{name}/")))
    assert cfg["backbone"] == pretrained["backbone"]
    assert cfg["data"].pop("augmentations") == {"crop_size": pretrained["data"]["image_size"]}
    assert cfg["data"] == pretrained["data"]
    assert (cfg["optimizer"]["name"], cfg["scheduler"]["name"]) == ("sgd", "step")
    assert max(cfg["scheduler"]["lr_decay_steps"]) < cfg["max_epochs"]
    assert {"pretrain_method", "checkpoint", "auto_resume", "wandb", "performance"} <= set(cfg)


def test_the_checkpoint_to_evaluate_is_asked_for() -> None:
    for name in ("linear/digits", "knn/default"):
        assert OmegaConf.is_missing(composed(name), "pretrained_feature_extractor")
    knn = composed("knn/default")
    assert (list(knn.k), list(knn.distance_function)) == ([1, 5, 20, 200], ["cosine", "euclidean"])
    assert knn.data == {"train_path": None, "val_path": None}


def users_own(folder: Path, text: str, *overrides: str) -> DictConfig:
    (folder / "mine.yaml").write_text(text)
    with initialize_config_dir(str(folder), version_base="1.2"):
        return compose("mine", overrides=list(overrides))


def test_a_users_own_file_may_take_our_groups(tmp_path: Path) -> None:
    text = "defaults: [_self_, /iecl: kl_only, /augmentations: symmetric]\ndata: {image_size: 64}\n"
    cfg = users_own(tmp_path, text)
    assert (cfg.iecl.generation.weight, cfg.iecl.eta) == (0, 0)
    assert cfg.augmentations[0].crop_size == 64


def test_our_groups_take_no_key_from_a_user(tmp_path: Path) -> None:
    # Hydra reads key=value as the choice of a file wherever a group has the key's name
    keys = ["method", "name", "seed", "precision", "strategy", "devices", "max_epochs"]
    text = "".join(f"{key}: given\n" for key in keys)
    cfg = users_own(tmp_path, text, *(f"{key}=changed" for key in keys))
    assert {cfg[key] for key in keys} == {"changed"}


if "SOLO_LEARN" in os.environ:

    def test_solo_learns_own_script_finds_them(tmp_path: Path) -> None:
        script = Path(os.environ["SOLO_LEARN"]).expanduser().resolve() / "main_pretrain.py"
        command = [sys.executable, str(script), "--cfg", "job"]
        command += ["--config-path", "pkg://iecl_solo.configs"]
        command += ["--config-name", "pretrain/digits/iecl_simclr"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = OmegaConf.create(done.stdout)
        assert printed == composed("pretrain/digits/iecl_simclr")
        assert not list(tmp_path.iterdir())
