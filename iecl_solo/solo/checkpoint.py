"""Checkpoints that any solo-learn script can read, and plain backbones out of any checkpoint."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iecl_solo.errors import IECLError
from iecl_solo.lipschitz import plain_weights

_COMPILED = "_orig_mod."  # what torch.compile(module) puts into the names of its parameters
_PARAMETRIZED = ".parametrizations."
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # how torch's message names a class that it did not load


def _parametrized_keys(state: Iterable[str], network: str, block: str) -> dict[str, str]:
    """Where the entries of a network's parametrised layers are kept, by number."""
    keys = [k for k in state if k.startswith(f"{network}.") and _PARAMETRIZED in k]
    # numbers, since a layer's own name may hold a word that the host's scripts rewrite
    side = "b" if network.startswith("momentum_") else "a"
    return {k: f"{block}.parametrized.{side}{i}" for i, k in enumerate(keys)}


def to_plain(
    state: dict[str, Tensor], model: nn.Module, networks: Iterable[str], block: str
) -> None:
    """Rename a state dict in place so that the networks stand in it as in the bare host's.

    The host's scripts load with ``strict=False``: a layer under another name than
    ``backbone.layer1.0.conv1.weight`` would be left at its random start without a word.
    Effective weights take those names; what training needs to go on is kept under the block's.
    """
    for key in [k for k in state if _COMPILED in k]:
        state[key.replace(_COMPILED, "")] = state.pop(key)
    for network in networks:
        kept = _parametrized_keys(list(state), network, block)
        for key, number in kept.items():
            state[number] = state.pop(key)
        for name, weight in plain_weights(getattr(model, network)).items():
            state[f"{network}.{name.replace(_COMPILED, '')}"] = weight


def from_plain(
    state: dict[str, Tensor], model: nn.Module, networks: Iterable[str], block: str
) -> None:
    """The inverse of ``to_plain`` for the model that is about to load ``state``, in place."""
    expected = model.state_dict().keys()
    for network in networks:
        plain = [k.replace(_COMPILED, "") for k in expected]
        for key, number in _parametrized_keys(plain, network, block).items():
            if number in state:
                state[key] = state.pop(number)
                module, _, weight = key.partition(_PARAMETRIZED)
                state.pop(f"{module}.{weight.split('.')[0]}", None)
    for key in expected:
        if _COMPILED in key and (bare := key.replace(_COMPILED, "")) in state:
            state[key] = state.pop(bare)


def _check_sums(file: Path) -> None:
    """Raise for a file of which a byte has changed: torch writes each tensor's CRC-32, reads none.

    Files of before torch 1.6 are no archives and have no sums.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            start = opened.read(2)
        if start in (b"", b"PK"):
            raise zipfile.BadZipFile("it is cut off" if start else "it is empty")
        return
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
        # found by fuzzing: torch takes a tensor that is marked as a folder for an empty one
        folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
        broken = broken or next(iter(folders), None)
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken.partition('/')[2]} is not what was written")


def _reason(error: Exception) -> str:
    """Why torch refused a file, without its advice to let the file run code."""
    said = str(error)
    if isinstance(error, pickle.UnpicklingError) and (name := _GLOBAL.search(said)):
        return f"it holds a {name[1]}, and only tensors and plain values are read from a file"
    if isinstance(error, pickle.UnpicklingError):
        return "what it holds is damaged"
    return said.splitlines()[0] if said else type(error).__name__


def _not_finite(state: Mapping[str, Any]) -> str | None:
    """The first tensor that holds a NaN or an infinity."""
    tensors = ((k, v) for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point())
    return next((k for k, v in tensors if not bool(v.isfinite().all())), None)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, under ``weights_only=True`` and on the CPU.

    Raises:
        IECLError: one line, for a file that is missing, truncated, damaged in any byte or no
            checkpoint, and for a model that is not finite.
    """
    file = Path(path)
    if not file.is_file():
        raise IECLError(f"checkpoint {path}: no such file")
    try:
        _check_sums(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch and zipfile raise almost anything
        raise IECLError(f"checkpoint {path}: it cannot be read ({_reason(error)})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise IECLError(f"checkpoint {path}: it holds no 'state_dict', so it is not solo-learn's")
    if name := _not_finite(checkpoint["state_dict"]):
        raise IECLError(
            f"checkpoint {path}: {name} is not finite: the training diverged, so that there is "
            "nothing to use; an earlier checkpoint or a new run with a smaller optimizer.lr may do"
        )
    return checkpoint


def backbone_state(checkpoint: dict[str, Any], path: str | Path = "") -> dict[str, Tensor]:
    """The online network of a host's checkpoint, under its own plain names.

    Takes the checkpoints of both generations (``backbone.`` and ``encoder.``).
    """
    state = checkpoint["state_dict"]
    for prefix in ("backbone.", "encoder."):
        found = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if found:
            return found
    raise IECLError(f"checkpoint {path}: it holds no backbone.* or encoder.* weights")


def load_strictly(backbone: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a backbone's weights; every tensor must find its place.

    Raises:
        IECLError: one line, when the checkpoint is of another architecture.
    """
    own = backbone.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unexpected or reshaped:
        first = (missing or unexpected or reshaped)[0]
        raise IECLError(
            f"checkpoint {path}: it is of another backbone ({len(missing)} tensors missing, "
            f"{len(unexpected)} unexpected, {len(reshaped)} of another shape; first: {first})"
        )
    backbone.load_state_dict(state)
