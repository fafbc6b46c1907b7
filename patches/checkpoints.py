"""Checkpoints that torch.load's default, weights_only=True, reads and that resume."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import pickle
import re
from collections.abc import Iterator, Mapping
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


def _keep_states_plain() -> None:
    def with_plain_states(original: Any) -> Any:
        @functools.wraps(original)
        def hook(self: Any, checkpoint: dict[str, Any]) -> None:
            original(self, checkpoint)
            make_plain(checkpoint)

        return hook

    for cls in _bases():
        cls.on_save_checkpoint = with_plain_states(cls.on_save_checkpoint)
        # of a run without the add-on, read with weights_only=False
        cls.on_load_checkpoint = with_plain_states(cls.on_load_checkpoint)


PLAIN_CHECKPOINTS = Patch(
    name="plain-checkpoints",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2 and GitHub main",
    symptom="checkpoints of methods with a predictor, and those of adamw on main, are refused by "
    "torch.load: a function and OmegaConf lists are in the scheduler's and optimiser's states; "
    "read with weights_only=False, the learning rate of the resumed run stands still",
    remedy="checkpoints are saved with plain data only; the function is made anew on resuming",
    present=_states_are_not_plain,
    apply=_keep_states_plain,
)


# --- buffers that are made when training starts ------------------------------------------------


def _late_names() -> set[str]:
    methods = importlib.import_module("solo.methods").METHODS.values()
    made = r"register_buffer\(\s*[\"'](\w+)"
    return {name for m in methods for name in re.findall(made, inspect.getsource(m.on_train_start))}


def _buffers_are_made_late(_: Path) -> bool:
    return bool(_late_names())


def _keep_late_buffers() -> None:
    names, base = _late_names(), _bases()[0]
    load, register = base.on_load_checkpoint, base.register_buffer

    @functools.wraps(load)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        load(self, checkpoint)
        state, empty = checkpoint["state_dict"], dict(_empty_buffers(self))
        for key in state.keys() & empty.keys():
            empty[key][key.rpartition(".")[2]] = state[key].clone()
        known = self.state_dict()
        self._resumed = {k: v.clone() for k, v in state.items() if k in names and k not in known}
        for name, tensor in self._resumed.items():
            register(self, name, tensor)

    @functools.wraps(register)
    def register_buffer(self: Any, name: str, tensor: Any, persistent: bool = True) -> None:
        resumed = self.__dict__.get("_resumed", {}).pop(name, None)
        register(self, name, tensor if resumed is None else resumed.to(tensor.device), persistent)

    base.on_load_checkpoint = on_load_checkpoint
    base.register_buffer = register_buffer


def _empty_buffers(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of every buffer that is None so far, with the dict that holds it."""
    for path, module in model.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is None:
                yield f"{path}.{name}" if path else name, module._buffers


RESUMED_BUFFERS = Patch(
    name="resumed-buffers",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2 and GitHub main, on any stack",
    symptom="a run of deepclusterv2, all4one, or swav with a queue cannot be resumed: its "
    "checkpoint holds buffers that the model has only once it trains",
    remedy="they are loaded, and kept when training starts",
    present=_buffers_are_made_late,
    apply=_keep_late_buffers,
)
