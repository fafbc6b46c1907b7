"""What each key of a pretraining configuration may be, the host's own blocks included.

One dataclass a block, in GitHub main's schema, as far as both hosts agree. A key that is not given
is the host's business; one that is given is checked here, before anything is derived from it.
"""

# ruff: noqa: RUF009  (_is and its kin are dataclasses.field by another name)

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry

from iecl_solo import checks
from iecl_solo.errors import IECLError, unknown_key

#: Optimisers of the hosts, and the ``optimizer.kwargs`` each one takes.
OPTIMIZERS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "lars": ("momentum", "dampening", "nesterov", "eta", "eps", "clip_lr", "exclude_bias_n_norm"),
    "adam": ("betas", "eps", "amsgrad"),
    "adamw": ("betas", "eps", "amsgrad"),
}
SCHEDULERS = ("warmup_cosine", "step", "none")
VIEWS = ("per_image", "batched")
#: Those in which every process holds the whole model. The processes are this package's to start.
STRATEGIES = (
    "auto",
    "ddp",
    "ddp_find_unused_parameters_false",
    "ddp_find_unused_parameters_true",
)
#: More processes than this read no image faster on any machine; to start them takes minutes.
MOST_WORKERS = max(64, 4 * (os.cpu_count() or 1))
# a key that is not known and looks like one that is was misspelt
_ALIKE = 0.75


def _devices(key: str, given: Any) -> None:
    """2, [0, 1] or "0,1": their number, or their indices."""
    allowed = "a whole number from 1 up, or a list of indices such as [0, 1],"
    try:
        if isinstance(given, str):
            given = [int(d) for d in given.split(",") if d.strip()] if "," in given else int(given)
        if isinstance(given, list):
            if not given:
                raise checks.refusal(key, given, allowed)
            for index in given:
                checks.whole(key, index, 0)
            if len(set(given)) < len(given):
                raise checks.refusal(key, given, "a list without repetitions")
        else:
            checks.whole(key, given, 1)
    except ValueError:  # of int, or of a check: an IECLError is one
        raise checks.refusal(key, given, allowed) from None


def _accelerator(key: str, given: Any) -> None:
    checks.one_of(key, given, ["auto", "gpu", *AcceleratorRegistry.available_accelerators()])
    if given == "auto":
        return
    # the class: an accelerator's constructor may import a library that is not installed
    known = {name: AcceleratorRegistry[name]["accelerator"] for name in AcceleratorRegistry}
    wanted = ("cuda", "mps") if given == "gpu" else (given,)
    if not any(known[name].is_available() for name in wanted):
        here = [name for name in ("cpu", "cuda", "mps") if known[name].is_available()]
        raise IECLError(f"{key}: {given} is not on this machine, {' or '.join(here)} is")


def _sources(key: str, given: Any) -> None:
    """A folder or a file, or several of them."""
    for path in given if isinstance(given, list) and given else [given]:
        checks.text(key, path)


def _fraction(key: str, given: Any) -> None:
    if given != -1:
        checks.number(key, given, 0, 1, above=True)
        if given == 1:
            raise checks.refusal(key, given, "a number between 0 and 1, or -1 for all images,")


def _name(key: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise checks.refusal(key, given, "a text")


def _limit(key: str, given: Any) -> None:
    """Lightning's limits of steps: -1 for none."""
    if given != -1:
        checks.whole(key, given, 1)


def _colours(key: str, given: Any, *, above: bool = False) -> None:
    if not isinstance(given, list) or len(given) != 3:
        raise checks.refusal(key, given, "a list of three numbers")
    for value in given:
        checks.number(key, value, 0 if above else None, above=above)


def _not_given(key: str, given: Any, instead: str) -> None:
    """A key of Lightning's trainer that a run sets by itself."""
    raise IECLError(f"{key}: {given!r} is not allowed, a run sets it by itself: {instead}")


def _steps(key: str, given: Any) -> None:
    if not isinstance(given, list):
        raise checks.refusal(key, given, "a list of epochs")
    for step in given:
        checks.whole(key, step, 0)


def _betas(key: str, given: Any) -> None:
    if not isinstance(given, list) or len(given) != 2:
        raise checks.refusal(key, given, "a list of two numbers from 0 to 1")
    for beta in given:
        checks.number(key, beta, 0, 1)


def _prototypes(key: str, given: Any) -> None:
    for count in given if isinstance(given, list) and given else [given]:
        checks.whole(key, count, 1)


def _share(key: str, given: Any) -> None:
    """Lightning's limits: a number of batches, or a share of them."""
    if isinstance(given, int):
        checks.whole(key, given, 1)
    else:
        checks.number(key, given, 0, 1, above=True)


def _is(check: Callable[..., None], *bounds: Any, **options: Any) -> Any:
    """A key of a block whose value is left to the host, or passes the check."""

    def checked(key: str, given: Any) -> None:
        check(key, given, *bounds, **options)

    return field(default=None, metadata={"check": checked})


_flag = partial(_is, checks.flag)
_probability = partial(_is, checks.number, 0, 1)


@dataclass
class OptimizerOptions:
    """``optimizer.kwargs``."""

    momentum: float = _is(checks.number, 0, 1)
    dampening: float = _is(checks.number, 0)
    nesterov: bool = _flag()
    eta: float = _is(checks.number, 0, above=True)
    eps: float = _is(checks.number, 0)
    clip_lr: bool = _flag()
    exclude_bias_n_norm: bool = _flag()
    betas: list[float] = _is(_betas)
    amsgrad: bool = _flag()


@dataclass
class Optimizer:
    """``optimizer:``. Learning rates are for 256 images."""

    name: str = _is(checks.one_of, OPTIMIZERS)
    batch_size: int = _is(checks.whole, 2)
    lr: float = _is(checks.number, 0, above=True)
    weight_decay: float = _is(checks.number, 0)
    classifier_lr: float = _is(checks.number, 0)
    exclude_bias_n_norm_wd: bool = _flag()
    kwargs: OptimizerOptions = field(default_factory=OptimizerOptions)


@dataclass
class Scheduler:
    """``scheduler:``."""

    name: str = _is(checks.one_of, SCHEDULERS)
    min_lr: float = _is(checks.number, 0)
    warmup_start_lr: float = _is(checks.number, 0)
    warmup_epochs: float = _is(checks.number, 0)
    lr_decay_steps: list[int] = _is(_steps)
    interval: str = _is(checks.one_of, ("step", "epoch"))


@dataclass
class Momentum:
    """``momentum:``, of the methods that have a momentum network."""

    base_tau: float = _is(checks.number, 0, 1)
    final_tau: float = _is(checks.number, 0, 1)
    classifier: bool = _flag()


@dataclass
class OnlineKNN:
    """``knn_eval:``."""

    enabled: bool = _flag()
    k: int = _is(checks.whole, 1)
    distance_func: str = _is(checks.one_of, ("euclidean", "cosine"))


@dataclass
class Data:
    """``data:``."""

    others: ClassVar[bool] = True
    dataset: str = _is(checks.text)
    train_path: Any = _is(_sources)
    val_path: str = _is(checks.text)
    views: str = _is(checks.one_of, VIEWS)
    on_error: str = _is(checks.one_of, ("raise", "skip"))
    format: str = _is(checks.one_of, ("image_folder", "h5", "dali", "webdataset", "hf"))
    shuffle_shards: int = _is(checks.whole, 0)
    no_labels: bool = _flag()
    fraction: float = _is(_fraction)
    num_workers: int = _is(checks.whole, 0, MOST_WORKERS)
    image_size: int = _is(checks.whole, 1)


@dataclass
class Crop:
    """``augmentations[i].rrc:``, torchvision's RandomResizedCrop."""

    enabled: bool = _flag()
    crop_min_scale: float = _is(checks.number, 0, 1, above=True)
    crop_max_scale: float = _is(checks.number, 0, 1, above=True)


@dataclass
class Jitter:
    """``augmentations[i].color_jitter:``."""

    prob: float = _probability()
    brightness: float = _is(checks.number, 0)
    contrast: float = _is(checks.number, 0)
    saturation: float = _is(checks.number, 0)
    hue: float = _is(checks.number, 0, 0.5)


@dataclass
class Chance:
    """An augmentation that has a probability alone."""

    prob: float = _probability()


@dataclass
class Learned:
    """``augmentations[i].saib:``, a frozen SAIB."""

    file: str = _is(checks.text)
    prob: float = _probability()


@dataclass
class Pipeline:
    """One of ``augmentations:``."""

    rrc: Crop = field(default_factory=Crop)
    color_jitter: Jitter = field(default_factory=Jitter)
    grayscale: Chance = field(default_factory=Chance)
    gaussian_blur: Chance = field(default_factory=Chance)
    solarization: Chance = field(default_factory=Chance)
    equalization: Chance = field(default_factory=Chance)
    horizontal_flip: Chance = field(default_factory=Chance)
    saib: Learned = field(default_factory=Learned)
    mean: list[float] = _is(_colours)
    std: list[float] = _is(_colours, above=True)
    crop_size: int = _is(checks.whole, 1)
    num_crops: int = _is(checks.whole, 1)


#: What both hosts read of each pipeline without asking whether it is there.
_OF_EACH_PIPELINE = tuple(f.name for f in fields(Pipeline) if f.name not in ("saib", "mean", "std"))


@dataclass
class Checkpoint:
    """``checkpoint:``."""

    enabled: bool = _flag()
    dir: str = _is(checks.folder_to_write)
    frequency: int = _is(checks.whole, 1)
    every_n_steps: int = _is(checks.whole, 0)
    keep: int = _is(checks.whole, 1)
    keep_prev: bool = _flag()


@dataclass
class Performance:
    """``performance:``."""

    disable_channel_last: bool = _flag()
    compile: bool = _flag()
    blocked_infonce: bool = _flag()


@dataclass
class Compare:
    """``compare:``."""

    dir: str = _is(checks.folder_to_write)


@dataclass
class Logger:
    """``csv:``, ``tensorboard:`` and ``wandb:``."""

    enabled: bool = _flag()
    project: str = _is(checks.text)
    entity: str = _is(checks.text)
    offline: bool = _flag()


@dataclass
class Switch:
    """A block that is switched on; its other keys are the host's."""

    others: ClassVar[bool] = True
    enabled: bool = _flag()


def _block(key: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise checks.refusal(key, given, "a block of keys")


@dataclass
class Backbone:
    """``backbone:``; what its ``kwargs`` may be is the network's business."""

    name: str = _is(checks.text)
    kwargs: dict[str, Any] = _is(_block)


@dataclass
class Pretraining:
    """The whole of it."""

    others: ClassVar[bool] = True
    name: str = _is(_name)
    method: str = _is(checks.text)
    seed: int = _is(checks.whole, 0, 2**32 - 1)
    max_epochs: int = _is(checks.whole, 1)
    num_nodes: int = _is(checks.whole, 1)
    devices: Any = _is(_devices)
    accelerator: str = _is(_accelerator)
    strategy: str = _is(checks.one_of, STRATEGIES)
    sync_batchnorm: bool = _flag()
    debug_augmentations: bool = _flag()
    finetune: bool = _flag()
    pretrain_method: str = _is(checks.text)
    pretrained_feature_extractor: str = _is(checks.text)
    accumulate_grad_batches: int = _is(checks.whole, 1)
    resume_from_checkpoint: str = _is(checks.text)
    # Lightning's trainer
    limit_train_batches: Any = _is(_share)
    limit_val_batches: Any = _is(_share)
    limit_test_batches: Any = _is(_share)
    limit_predict_batches: Any = _is(_share)
    val_check_interval: Any = _is(_share)
    check_val_every_n_epoch: int = _is(checks.whole, 1)
    num_sanity_val_steps: int = _is(checks.whole, -1)
    log_every_n_steps: int = _is(checks.whole, 1)
    gradient_clip_val: float = _is(checks.number, 0)
    gradient_clip_algorithm: str = _is(checks.one_of, ("norm", "value"))
    max_steps: int = _is(_limit)
    min_epochs: int = _is(checks.whole, 0)
    min_steps: int = _is(checks.whole, 0)
    deterministic: Any = _is(checks.one_of, (True, False, "warn"))
    benchmark: bool = _flag()
    inference_mode: bool = _flag()
    detect_anomaly: bool = _flag()
    use_distributed_sampler: bool = _flag()
    logger: Any = _is(_not_given, "csv, tensorboard and wandb choose the loggers")
    callbacks: Any = _is(_not_given, "iecl_solo.load takes callbacks")
    plugins: Any = _is(_not_given, "checkpoint says how checkpoints are written")
    enable_checkpointing: Any = _is(_not_given, "checkpoint.enabled says it")
    enable_progress_bar: Any = _is(_not_given, "it prints a line an epoch")
    enable_model_summary: Any = _is(_not_given, "it prints a line an epoch")
    default_root_dir: Any = _is(_not_given, "checkpoint.dir says where it writes")
    model_registry: Any = _is(_not_given, "wandb keeps runs")
    fast_dev_run: Any = _is(_not_given, "limit_train_batches makes a run short")
    barebones: Any = _is(_not_given, "the benchmark of kind cost measures a step")
    overfit_batches: Any = _is(_not_given, "data.train_path may name fewer images")
    reload_dataloaders_every_n_epochs: Any = _is(_not_given, "its loader has an order of its own")
    backbone: Backbone = field(default_factory=Backbone)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    momentum: Momentum = field(default_factory=Momentum)
    knn_eval: OnlineKNN = field(default_factory=OnlineKNN)
    data: Data = field(default_factory=Data)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    performance: Performance = field(default_factory=Performance)
    csv: Logger = field(default_factory=Logger)
    tensorboard: Logger = field(default_factory=Logger)
    wandb: Logger = field(default_factory=Logger)
    auto_resume: Switch = field(default_factory=Switch)
    auto_umap: Switch = field(default_factory=Switch)
    compare: Compare = field(default_factory=Compare)


def _several(key: str, given: Any, check: Callable[..., None], *bounds: Any, **more: Any) -> None:
    """One value, or a list of different ones."""
    values = given if isinstance(given, list) else [given]
    if not values or None in values:
        raise checks.refusal(key, given, "a list of at least one value")
    for value in values:
        check(key, value, *bounds, **more)
        if values.count(value) > 1:
            raise checks.refusal(key, given, "a list without repetitions")


@dataclass
class Neighbours:
    """A configuration of ``iecl-solo knn``, which is the host's main_knn.py's."""

    pretrained_feature_extractor: str = _is(checks.text)
    k: list[int] = _is(_several, checks.whole, 1)
    temperature: list[float] = _is(_several, checks.number, 0, above=True)
    distance_function: list[str] = _is(_several, checks.one_of, ("cosine", "euclidean"))
    feature_type: list[str] = _is(_several, checks.one_of, ("backbone",))
    batch_size: int = _is(checks.whole, 1)
    num_workers: int = _is(checks.whole, 0, MOST_WORKERS)
    data: Data = field(default_factory=Data)


#: Options of the hosts' methods by name; they mean the same wherever they occur.
METHOD_OPTIONS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(
        (
            *("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim", "decoder_embed_dim"),
            *("decoder_depth", "decoder_num_heads", "sk_iters", "kmeans_iters"),
            *("whitening_iters", "whitening_size"),
        ),
        partial(checks.whole, low=1),
    ),
    **dict.fromkeys(
        (
            *("queue_size", "epoch_queue_starts", "freeze_last_layer", "freeze_prototypes_epochs"),
            "warmup_teacher_temperature_epochs",
        ),
        partial(checks.whole, low=0),
    ),
    **dict.fromkeys(
        (
            *("temperature", "temperature_q", "temperature_k", "student_temperature"),
            *("teacher_temperature", "warmup_teacher_temperature", "sk_epsilon", "scale_loss"),
        ),
        partial(checks.number, low=0, above=True),
    ),
    **dict.fromkeys(
        (
            *("sim_loss_weight", "var_loss_weight", "cov_loss_weight", "lamb", "whitening_eps"),
            "clip_grad",
        ),
        partial(checks.number, low=0),
    ),
    **dict.fromkeys(
        (
            *("use_bn_in_head", "norm_last_layer", "iternorm", "norm_pix_loss", "supervised"),
            "momentum_classifier",
        ),
        checks.flag,
    ),
    # these two and momentum_classifier stand in YAMLs of solo-learn's, which reads them elsewhere
    **dict.fromkeys(
        ("mask_ratio", "base_tau_momentum", "final_tau_momentum"),
        partial(checks.number, low=0, high=1),
    ),
    "num_prototypes": _prototypes,
}


def check_block(path: str, block_class: Any, block: Any, known: tuple[str, ...] = ()) -> None:
    """Check what a block gives.

    Args:
        path: the block's own key with a dot behind it, or nothing for the whole.
        block_class: its dataclass. Where it says ``others``, keys that it does not name are left
            alone, unless they look like one that was misspelt.
        block: as written, in plain containers.
        known: more keys that are right.

    Raises:
        IECLError: one line, with the key's full path.

    Example:
        >>> check_block("scheduler.", Scheduler, {"warmup_epoch": 3})
        Traceback (most recent call last):
        iecl_solo.errors.IECLError: unknown key scheduler.warmup_epoch: did you mean ...
    """
    if not isinstance(block, Mapping):
        raise checks.refusal(path.rstrip("."), block, "a block of keys")
    by_name = {f.name: f for f in fields(block_class)}
    names = [*by_name, *known]
    for key, value in block.items():
        if key not in by_name:
            alike = difflib.get_close_matches(str(key), names, 1, _ALIKE)
            if key not in known and (alike or not getattr(block_class, "others", False)):
                raise unknown_key(path, str(key), sorted(names))
        elif value is None:
            continue
        elif is_dataclass(by_name[key].default_factory):
            check_block(f"{path}{key}.", by_name[key].default_factory, value)
        else:
            by_name[key].metadata["check"](f"{path}{key}", value)


def check_method_options(given: Any, allowed: set[str] | None) -> None:
    """Check ``method_kwargs``.

    Args:
        given: the block.
        allowed: the options that the method reads; None if that is not known.
    """
    if not isinstance(given, Mapping):
        raise checks.refusal("method_kwargs", given, "a block of keys")
    for key, value in given.items():
        # solo-learn's own YAMLs give some methods the options of others
        if allowed is not None and key not in allowed and key not in METHOD_OPTIONS:
            known = sorted(allowed & METHOD_OPTIONS.keys()) or sorted(allowed)
            raise unknown_key("method_kwargs.", str(key), known)
        if key in METHOD_OPTIONS and value is not None:
            METHOD_OPTIONS[key](f"method_kwargs.{key}", value)


# blocks that others check, or that are handed on as they are
_BLOCKS = (
    *("method_kwargs", "augmentations", "monitor"),
    *(
        "evaluation",
        "objectives",
        "augmentations_cfg",
        "dali",
        "wandb_run_id",
    ),
    *("versions", "hydra"),
)


def knows(key: str, known: tuple[str, ...] = ()) -> bool:
    """Whether a dotted key of a configuration is read by anyone.

    Args:
        key: of a setting.
        known: names of blocks that are an objective's.

    Example:
        >>> knows("optimizer.lr"), knows("optimizer.rate"), knows("iecl.beta", ("iecl",))
        (True, False, True)
    """
    block: Any = Pretraining
    first, *rest = key.split(".")
    if first in (*_BLOCKS, "precision", *known) or first in _TRAINER:
        return True
    for part in (first, *rest):
        if block is Backbone and part != "name":
            return part == "kwargs"
        by_name = {f.name: f for f in fields(block)} if is_dataclass(block) else {}
        if part not in by_name:
            return False
        block = by_name[part].default_factory
    return True


def check_steps(scheduler: Mapping[str, Any]) -> None:
    """Raises: IECLError, when rates are to fall in steps and no step is given."""
    if scheduler.get("name") == "step" and not scheduler.get("lr_decay_steps"):
        raise IECLError("scheduler.lr_decay_steps: no value is given, scheduler.name=step needs it")


_TRAINER = tuple(inspect.signature(Trainer.__init__).parameters)


def check(given: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """Check a whole configuration, but for what needs the host or the disk to be known.

    Args:
        given: as composed, in plain containers.
        known: names of blocks that are an objective's.

    Raises:
        IECLError: one line: the key, what was given, what is allowed.
    """
    check_block("", Pretraining, given, (*_BLOCKS, *_TRAINER, *known))
    for i, pipeline in enumerate(given.get("augmentations") or ()):
        check_block(f"augmentations[{i}].", Pipeline, pipeline)
        for name in _OF_EACH_PIPELINE:
            if pipeline.get(name) is None:
                raise IECLError(f"augmentations[{i}].{name}: no value is given")
        crop = pipeline.get("rrc") or {}
        if (crop.get("crop_min_scale") or 0) > (crop.get("crop_max_scale") or 1):
            raise IECLError(f"augmentations[{i}].rrc: crop_min_scale is above crop_max_scale")
    check_steps(given.get("scheduler") or {})
    optimizer = given.get("optimizer") or {}
    for option in optimizer.get("kwargs") or ():
        key = f"optimizer.kwargs of {optimizer['name']}"
        checks.one_of(key, option, OPTIMIZERS[optimizer["name"]])
