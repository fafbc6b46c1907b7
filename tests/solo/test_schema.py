"""Each wrong setting of a pretraining run is one line that names the key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support import HOST, METHOD_KWARGS, build, raw_config

from iecl_solo import checks
from iecl_solo.digits import write_digits
from iecl_solo.errors import IECLError
from iecl_solo.solo import schema
from iecl_solo.solo.build import build_model
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.settings import prepare_pretrain
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import pretrain

#: What is set, and what the line must say. Before, each ended in a traceback, in no answer, or was
#: accepted without a word.
WRONG: list[tuple[str, object, str]] = [
    ("optimizer.kwargs.momentum", -1, "a number from 0 to 1"),
    ("optimizer.kwargs.momentum", "abc", "a number from 0 to 1"),
    ("optimizer.kwargs.momentum", 5, "a number from 0 to 1"),
    ("optimizer.kwargs.momentun", 0.9, "did you mean 'momentum'"),
    ("optimizer.kwargs.betas", [0.9, 0.99], "optimizer.kwargs of sgd"),
    ("optimizer.lr", float("inf"), "a number above 0"),
    ("optimizer.lr", float("nan"), "a number above 0"),
    ("optimizer.lr", 0, "a number above 0"),
    ("optimizer.lr", True, "a number above 0"),
    ("optimizer.classifier_lr", -1, "a number from 0 up"),
    ("optimizer.weight_decay", -1, "a number from 0 up"),
    ("optimizer.batch_size", 1, "a whole number from 2 up"),
    ("optimizer.batch_sise", 8, "did you mean 'batch_size'"),
    ("optimizer.anything", 8, "unknown key optimizer.anything"),
    ("scheduler.warmup_epochs", "abc", "a number from 0 up"),
    ("scheduler.warmup_epochs", -1, "a number from 0 up"),
    ("scheduler.warmup_epoch", 1, "did you mean 'warmup_epochs'"),
    ("scheduler.lr_decay_steps", 3, "a list of epochs"),
    ("scheduler.interval", "week", "unknown value 'week'"),
    ("momentum.base_tau", 1.5, "a number from 0 to 1"),
    ("momentum.base_tau", "abc", "a number from 0 to 1"),
    ("data.num_workers", -1, "a whole number from 0"),
    ("data.num_workers", "abc", "a whole number from 0"),
    ("data.num_workers", 999, "a whole number from 0"),
    ("data.format", "foo", "unknown value 'foo'"),
    ("data.no_labels", "perhaps", "true or false"),
    ("data.image_size", 0, "a whole number from 1 up"),
    ("data.num_worker", 1, "did you mean 'num_workers'"),
    ("seed", -1, "a whole number from 0"),
    ("seed", "abc", "a whole number from 0"),
    ("seed", 99999999999, "a whole number from 0"),
    ("checkpoint.frequency", -1, "a whole number from 1 up"),
    ("checkpoint.frequency", "abc", "a whole number from 1 up"),
    ("checkpoint.frequency", 0, "a whole number from 1 up"),
    ("checkpoint.enabled", "foo", "true or false"),
    ("checkpoint.dir", "/dev/null/runs", "/dev/null is not a directory"),
    ("accumulate_grad_batches", 0, "a whole number from 1 up"),
    ("accumulate_grad_batches", -1, "a whole number from 1 up"),
    ("num_nodes", 0, "a whole number from 1 up"),
    ("accelerator", "foo", "unknown value 'foo'"),
    ("devices", 0, "a whole number from 1 up, or a list"),
    ("devices", -1, "a whole number from 1 up, or a list"),
    ("devices", [], "a whole number from 1 up, or a list"),
    ("devices", "all", "a whole number from 1 up, or a list"),
    ("strategy", "foo", "unknown value 'foo'"),
    ("max_epochs", 0, "a whole number from 1 up"),
    ("max_epoch", 3, "did you mean 'max_epochs'"),
    ("limit_train_batches", 0, "a whole number from 1 up"),
    ("limit_train_batches", 1.5, "a number above 0 and up to 1"),
    ("limit_train_batchs", 3, "did you mean 'limit_train_batches'"),
    ("method_kwargs.temperature", "abc", "a number above 0"),
    ("method_kwargs.temperature", 0, "a number above 0"),
    ("method_kwargs.temperature", -1, "a number above 0"),
    ("method_kwargs.proj_output_dim", -1, "a whole number from 1 up"),
    ("method_kwargs.temprature", 0.1, "did you mean 'temperature'"),
    ("method_kwargs", 3, "a block of keys"),
    ("knn_eval.k", 0, "a whole number from 1 up"),
    ("knn_eval.distance_func", "cosin", "did you mean 'cosine'"),
    ("csv.enabled", "abc", "true or false"),
    ("performance.compile", "abc", "true or false"),
    ("optimizer", 3, "optimizer.name: no value is given"),
    ("augmentations", None, "a list of at least one pipeline"),
    ("augmentations[0].rrc.crop_min_scale", 5, "a number above 0 and up to 1"),
    ("augmentations[0].rrc.crop_min_scale", -1, "a number above 0 and up to 1"),
    ("augmentations[0].grayscale.prob", "abc", "a number from 0 to 1"),
    ("augmentations[0].color_jitter.prob", 5, "a number from 0 to 1"),
    ("augmentations[0].color_jitter.hue", 1, "a number from 0 to 0.5"),
    ("augmentations[0].crop_size", 0, "a whole number from 1 up"),
    ("augmentations[0].num_crop", 2, "did you mean 'num_crops'"),
    ("climb", {"beta": 3}, "does not carry it"),
    ("iecl", 5, "not a block of keys"),
    ("method", 5, "method: 5 is not allowed"),
    ("method", ["simclr"], "method: ['simclr'] is not allowed"),
    ("name", [1], "name: '[1]' is not allowed"),
    ("accelerator", "tpu", "accelerator: tpu is not on this machine"),
    ("devices", 999, "devices: 999 is more than the"),
    ("devices", [0, 0], "devices: [0, 0] is not allowed"),
    ("strategy", "deepspeed", "unknown value 'deepspeed'"),
    ("data.train_path", 5, "a text"),
    ("data.train_path", [], "a text"),
    ("data.fraction", 0, "a number above 0"),
    ("data.fraction", 1, "a number between 0 and 1"),
    ("checkpoint.keeps", 2, "did you mean 'keep'"),
    ("csv.enable", True, "did you mean 'enabled'"),
    ("performance.anything", 1, "unknown key performance.anything"),
    ("performance.blocked_infonce", "abc", "true or false"),
    ("resume_from_checkpoint", 5, "a text"),
    ("scheduler.name", "step", "scheduler.lr_decay_steps: no value is given"),
    ("compare.directory", "x", "unknown key compare.directory"),
    ("augmentations[0].rrc", None, "no value is given"),
    ("augmentations[0].color_jitter", None, "no value is given"),
    ("augmentations[0].anything", 1, "unknown key augmentations[0].anything"),
    ("augmentations[0].mean", [1], "a list of three numbers"),
    ("augmentations[0].std", [0, 0, 0], "a number above 0"),
    # Lightning's trainer
    ("gradient_clip_val", "abc", "a number from 0 up"),
    ("gradient_clip_algorithm", "foo", "unknown value 'foo'"),
    ("log_every_n_steps", 0, "a whole number from 1 up"),
    ("check_val_every_n_epoch", 0, "a whole number from 1 up"),
    ("val_check_interval", "abc", "a number above 0"),
    ("max_steps", 0, "a whole number from 1 up"),
    ("min_epochs", "abc", "a whole number from 0 up"),
    ("num_sanity_val_steps", -5, "a whole number from -1 up"),
    ("deterministic", "abc", "unknown value 'abc'"),
    ("logger", "foo", "csv, tensorboard and wandb choose"),
    ("callbacks", ["foo"], "a run sets it by itself"),
    ("fast_dev_run", True, "limit_train_batches makes a run short"),
    ("overfit_batches", 0.5, "a run sets it by itself"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG, ids=[f"{k}={v}" for k, v, _ in WRONG])
@pytest.mark.counts("bad inputs tried")
def test_a_wrong_setting_is_one_line(key: str, value: object, said: str, images: Path):
    cfg = OmegaConf.create(raw_config("iecl_simclr", images))
    if key == "optimizer":
        cfg.optimizer = value
    else:
        OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    with pytest.raises(IECLError) as error:
        complete(cfg, HOST)
    message = str(error.value)
    assert said in message and "\n" not in message
    assert key.rpartition(".")[0].partition("[")[0] in message


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("mocov2plus", "queue_size: 32 is not allowed, a multiple of the 12 images of a step is"),
        ("iecl_nnclr", "queue_size: 16 is not allowed, a multiple of the 12 images of a step is"),
        ("wmse", "batch_size: 12 is not allowed, a multiple of method_kwargs.whitening_size, 8"),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(method: str, said: str, images: Path):
    """Found by fuzzing: solo-learn asserts it without a word, in the first step."""
    with pytest.raises(IECLError, match=said):
        build(method, images, optimizer__batch_size=12)


def test_what_only_building_shows_is_one_line(images: Path):
    channels = {"name": "timm/resnet18", "kwargs": {"channels": [0, 0, 0, 0]}}
    with pytest.raises(IECLError) as error:
        build("simclr", images, backbone=channels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("max_time", "abc"), ("profiler", "foo")])
def test_what_lightning_refuses_is_one_line(key: str, value: object, images: Path, tmp_path: Path):
    given = raw_config("simclr", images, checkpoint__dir=str(tmp_path), **{key: value})
    with pytest.raises(IECLError, match="Lightning's trainer refuses") as error:
        pretrain(OmegaConf.create(given))
    assert "\n" not in str(error.value) and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_several_machines_of_which_one_is_started_do_not_wait(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    given = raw_config("simclr", images, checkpoint__dir=str(tmp_path), num_nodes=2)
    with pytest.raises(IECLError, match="num_nodes: 2 machines, and nothing says where"):
        pretrain(OmegaConf.create(given))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="where not even root makes a folder")
def test_a_folder_that_cannot_be_made_is_one_line(images: Path):
    given = raw_config("simclr", images, checkpoint__dir="/proc/nowhere")
    with pytest.raises(IECLError, match=r"^/proc/nowhere/\S+: it cannot be made \(.*\)$"):
        pretrain(OmegaConf.create(given))
    with pytest.raises(IECLError, match="it cannot be made"):
        write_digits("/proc/nowhere")


def test_a_data_set_that_is_not_there_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("http_proxy", "https_proxy"):  # no answer from anywhere, and at once
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    cfg = OmegaConf.create(raw_config("simclr", images))
    cfg.data.dataset, cfg.data.train_path = "cifar10", str(tmp_path)
    cfg = complete(cfg, HOST)
    with pytest.raises(IECLError, match=r"data.train_path: .*cifar10") as error:
        pretrain_loader(cfg, HOST)
    assert "\n" not in str(error.value)


def test_an_accelerator_that_is_not_there_is_named(images: Path):
    import torch

    cfg = OmegaConf.create(raw_config("simclr", images, accelerator="gpu"))
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        complete(cfg, HOST)
        return
    with pytest.raises(IECLError, match="accelerator: gpu is not on this machine"):
        complete(cfg, HOST)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(images: Path, tmp_path: Path):
    tmp_path.chmod(0o500)
    cfg = OmegaConf.create(raw_config("simclr", images, checkpoint__dir=str(tmp_path / "runs")))
    with pytest.raises(IECLError, match=r"checkpoint.dir: .*cannot be written to"):
        complete(cfg, HOST)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("devices", [0]),
        ("devices", "1"),
        ("devices", "0,1"),
        ("optimizer.kwargs.nesterov", True),
        ("scheduler.lr_decay_steps", [3, 5]),
        ("seed", 2**32 - 1),
        ("limit_train_batches", 0.5),
        ("limit_train_batches", 3),
        ("max_steps", -1),
        ("deterministic", "warn"),
        ("data.fraction", -1),
        ("augmentations[0].mean", [0.5, 0.5, 0.5]),
        ("my_own_note", "of a user's own"),
        ("data.my_own_note", "of a user's own"),
        ("strategy", "ddp"),
    ],
)
def test_a_right_setting_stays(key: str, value: object, images: Path):
    cfg = OmegaConf.create(raw_config("simclr", images))
    OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    assert OmegaConf.select(prepare_pretrain(cfg, HOST), key) == value


@pytest.mark.parametrize("method", sorted(set(METHOD_KWARGS) & set(HOST.methods)))
def test_every_option_of_a_method_is_known(method: str):
    if hasattr(HOST.methods[method], "Config"):
        return
    read = HOST.options(method)
    assert read is not None and set(METHOD_KWARGS[method]) <= read
    assert "temperature_of_nothing" not in read
    schema.check_method_options(METHOD_KWARGS[method], read)


SCRIPTS = HOST.path.parent / "scripts" / "pretrain"


@pytest.mark.skipif(not SCRIPTS.is_dir(), reason="1.0.2 brings no YAMLs")
def test_solo_learns_own_yamls_pass():
    seen = 0
    for path in sorted(SCRIPTS.rglob("*.yaml")):
        cfg = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(cfg, dict):
            continue  # a list of augmentations
        if "method" not in cfg or cfg["method"] not in HOST.methods or cfg["method"] == "mae":
            continue
        cfg = {
            k: v for k, v in cfg.items() if k not in ("defaults", "augmentations", "accelerator")
        }
        schema.check(cfg)
        schema.check_method_options(cfg.get("method_kwargs", {}), HOST.options(cfg["method"]))
        seen += 1
    assert seen > 20


_BLOCKS = {
    "optimizer": schema.Optimizer,
    "scheduler": schema.Scheduler,
    "momentum": schema.Momentum,
    "knn_eval": schema.OnlineKNN,
}


@settings(deadline=None, max_examples=60)
@given(
    block=st.sampled_from(sorted(_BLOCKS)),
    key=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12),
    value=st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans()),
)
def test_any_unknown_key_of_a_closed_block_is_refused(block: str, key: str, value: object):
    if key in {f for f in _BLOCKS[block].__dataclass_fields__}:
        return
    with pytest.raises(IECLError, match=f"unknown key {block}.{key}:") as error:
        schema.check_block(f"{block}.", _BLOCKS[block], {key: value})
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=60)
@given(
    value=st.one_of(st.text(), st.floats(), st.integers(), st.lists(st.integers()), st.booleans())
)
def test_a_number_is_a_finite_number(value: object):
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = right and 0 < value < float("inf")
    try:
        checks.number("key", value, 0, above=True)
    except IECLError as error:
        assert not right and str(error).startswith("key: ")
    else:
        assert right


def test_a_wrong_network_argument_leaves_a_right_one_alone(images: Path):
    cfg = prepare_pretrain(OmegaConf.create(raw_config("simclr", images)), HOST)
    assert build_model(cfg, HOST) is not None
