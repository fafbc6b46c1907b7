"""Checkpoints that torch.load's default, weights_only=True, can read."""

from __future__ import annotations

import functools
import importlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage


def plain(value: Any) -> Any:
    """``value`` with every OmegaConf container in it turned into a dict or a list.

    Dicts, lists and tuples are copied, whatever else there is (tensors, numbers) is kept.

    Example:
        >>> from omegaconf import OmegaConf
        >>> plain({"betas": OmegaConf.create([0.9, 0.999])})
        {'betas': [0.9, 0.999]}
    """
    from omegaconf import Container, OmegaConf

    if isinstance(value, Container):
        return OmegaConf.to_container(value, resolve=True)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def _without_functions(state: Mapping[str, Any]) -> dict[str, Any]:
    # static_lr puts a partial in get_lr's place. It holds the whole scheduler and, once loaded,
    # a copy of it that stands still: configure_optimizers makes a new one on resuming.
    return {key: value for key, value in state.items() if not callable(value)}


def make_plain(checkpoint: dict[str, Any]) -> None:
    """Keep only plain data in a checkpoint's optimiser and scheduler states, in place."""
    if "lr_schedulers" in checkpoint:
        states = checkpoint["lr_schedulers"]
        checkpoint["lr_schedulers"] = [plain(_without_functions(state)) for state in states]
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = plain(checkpoint["optimizer_states"])


def _bases() -> list[Any]:
    return [
        importlib.import_module("solo.methods.base").BaseMethod,
        importlib.import_module("solo.methods.linear").LinearModel,
    ]


def _states_are_not_plain(_: Path) -> bool:
    import torch

    static_lr = getattr(importlib.import_module("solo.methods.base"), "static_lr", None)
    if static_lr is None:
        return False
    state = {"get_lr": functools.partial(static_lr, get_lr=list)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError:
        return True
    return False


def _save_plain_states() -> None:
    def with_plain_states(original: Any) -> Any:
        @functools.wraps(original)
        def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
            original(self, checkpoint)
            make_plain(checkpoint)

        return on_save_checkpoint

    for cls in _bases():
        cls.on_save_checkpoint = with_plain_states(cls.on_save_checkpoint)


PLAIN_CHECKPOINTS = Patch(
    name="plain-checkpoints",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2 and GitHub main",
    symptom="checkpoints of methods with a predictor, and those of adamw on main, are refused by "
    "torch.load: a function and OmegaConf lists are in the scheduler's and optimiser's states; "
    "read with weights_only=False, the learning rate of the resumed run stands still",
    remedy="checkpoints are saved with plain data only; the function is made anew on resuming",
    present=_states_are_not_plain,
    apply=_save_plain_states,
)
