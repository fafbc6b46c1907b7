"""Hooks of Lightning 1 that solo-learn 1.0.2 has and Lightning 2 refuses or calls otherwise."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage

_EPOCH_END = "validation_epoch_end"
_BATCH_END = "on_train_batch_end"


def host_modules() -> list[type]:
    """The host's own LightningModules: its bases, its linear probe and its methods."""
    methods = importlib.import_module("solo.methods").METHODS.values()
    every = {cls for method in methods for cls in method.__mro__}
    return [cls for cls in every if cls.__module__.startswith("solo.")]


def _lightning_has(hook: str) -> bool:
    return hasattr(importlib.import_module("lightning.pytorch").LightningModule, hook)


# --- validation_epoch_end ----------------------------------------------------------------------


def _bases_with_epoch_end() -> list[type]:
    """The uppermost classes that have the hook; the others inherit what is done to these."""
    return [
        cls
        for cls in host_modules()
        if _EPOCH_END in vars(cls) and not any(_EPOCH_END in vars(up) for up in cls.__mro__[1:])
    ]


def _epoch_end_is_refused(_: Path) -> bool:
    return bool(_bases_with_epoch_end()) and not _lightning_has(_EPOCH_END)


def _collect_outputs(cls: Any) -> None:
    original_init = cls.__init__

    @functools.wraps(original_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        # Lightning refuses a module whose attribute of this name can be called. On the class it
        # must stay, where super().validation_epoch_end(...) looks for it.
        setattr(self, _EPOCH_END, None)
        self._validation_outputs = []

    def on_validation_epoch_start(self: Any) -> None:
        self._validation_outputs.clear()

    def on_validation_batch_end(self: Any, outputs: Any, *_: Any) -> None:
        self._validation_outputs.append(outputs)

    def on_validation_epoch_end(self: Any) -> None:
        outputs, self._validation_outputs = self._validation_outputs, []
        getattr(type(self), _EPOCH_END)(self, outputs)

    for hook in (
        __init__,
        on_validation_epoch_start,
        on_validation_batch_end,
        on_validation_epoch_end,
    ):
        setattr(cls, hook.__name__, hook)


def _call_epoch_end() -> None:
    for cls in _bases_with_epoch_end():
        _collect_outputs(cls)


VALIDATION_EPOCH_END = Patch(
    name="validation-epoch-end",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2",
    symptom="every method and the linear probe define validation_epoch_end, which Lightning 2 "
    "refuses to train",
    remedy="the outputs of validation_step are collected and handed to it at the epoch's end",
    present=_epoch_end_is_refused,
    apply=_call_epoch_end,
)


# --- on_train_batch_end ------------------------------------------------------------------------


def _classes_that_want_a_loader_index() -> list[type]:
    def wants(hook: Any) -> bool:
        index = inspect.signature(hook).parameters.get("dataloader_idx")
        return index is not None and index.default is inspect.Parameter.empty

    return [c for c in host_modules() if _BATCH_END in vars(c) and wants(vars(c)[_BATCH_END])]


def _loader_index_is_not_given(_: Path) -> bool:
    lightning = importlib.import_module("lightning.pytorch").LightningModule
    given = inspect.signature(getattr(lightning, _BATCH_END)).parameters
    return "dataloader_idx" not in given and bool(_classes_that_want_a_loader_index())


def _give_loader_index() -> None:
    def with_default(hook: Any) -> Any:
        def on_train_batch_end(
            self: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            hook(self, outputs, batch, batch_idx, dataloader_idx)

        on_train_batch_end.__doc__ = hook.__doc__
        return on_train_batch_end

    for cls in _classes_that_want_a_loader_index():
        setattr(cls, _BATCH_END, with_default(vars(cls)[_BATCH_END]))


TRAIN_BATCH_END = Patch(
    name="train-batch-end",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2",
    symptom="methods with a momentum network fail after their first step: on_train_batch_end "
    "wants a fourth argument that Lightning 2 does not pass",
    remedy="the argument is 0 when it is not passed",
    present=_loader_index_is_not_given,
    apply=_give_loader_index,
)


# --- clip_gradients ----------------------------------------------------------------------------


def _classes_that_clip_for_themselves() -> list[type]:
    """Those whose clip_gradients is not the one that Lightning calls."""
    return [
        cls
        for cls in host_modules()
        if "clip_gradients" in vars(cls)
        and "gradient_clip_val" not in inspect.signature(vars(cls)["clip_gradients"]).parameters
    ]


def _clipping_is_taken(_: Path) -> bool:
    return bool(_classes_that_clip_for_themselves()) and _lightning_has("clip_gradients")


def _clip_for_both() -> None:
    def for_both(cls: Any, of_the_host: Any) -> Any:
        def clip_gradients(self: Any, *args: Any, **kwargs: Any) -> Any:
            if "clip" in kwargs or (args and isinstance(args[0], (int, float))):
                return of_the_host(self, *args, **kwargs)
            return super(cls, self).clip_gradients(*args, **kwargs)

        clip_gradients.__doc__ = of_the_host.__doc__
        return clip_gradients

    for cls in _classes_that_clip_for_themselves():
        cls.clip_gradients = for_both(cls, vars(cls)["clip_gradients"])  # type: ignore[attr-defined]


CLIP_GRADIENTS = Patch(
    name="clip-gradients",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2",
    symptom="dino fails in its first step: its clip_gradients(clip) has the name of the hook by "
    "which Lightning clips",
    remedy="a call with a number goes to the host's, any other to Lightning's",
    present=_clipping_is_taken,
    apply=_clip_for_both,
)


# --- trainer.val_dataloaders -------------------------------------------------------------------


class _ListedLoaders:
    """A Trainer whose val_dataloaders are a list, as Lightning 1's were."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    @property
    def val_dataloaders(self) -> list[Any]:
        loaders = self._trainer.val_dataloaders
        return loaders if isinstance(loaders, list) else [loaders]


def _umap_callback() -> Any:
    # an optional part of the host: absent where umap, pandas or seaborn are
    return getattr(sys.modules.get("solo.utils.auto_umap"), "AutoUMAP", None)


def _umap_wants_a_list(_: Path) -> bool:
    callback = _umap_callback()
    return callback is not None and "val_dataloaders[0]" in inspect.getsource(callback.plot)


def _give_umap_a_list() -> None:
    callback = _umap_callback()
    original_plot = callback.plot

    @functools.wraps(original_plot)
    def plot(self: Any, trainer: Any, module: Any) -> None:
        original_plot(self, _ListedLoaders(trainer), module)

    callback.plot = plot


UMAP_LOADERS = Patch(
    name="umap-loaders",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2",
    symptom="AutoUMAP fails: trainer.val_dataloaders is the loader itself, no list any more",
    remedy="AutoUMAP is handed a trainer that has them in a list",
    present=_umap_wants_a_list,
    apply=_give_umap_a_list,
)
