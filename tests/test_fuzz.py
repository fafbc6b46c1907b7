"""Fuzzing: any valid configuration builds and steps, any wrong one is a line; so is any damage."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import Count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer, seed_everything
from omegaconf import OmegaConf
from support import HOST, METHOD_KWARGS, batches, raw_config, same_tensors, train_on

from iecl_solo.errors import IECLError
from iecl_solo.experiments.store import Store, read_rows
from iecl_solo.saib import load_saib, make_saib, save_saib
from iecl_solo.solo.build import build_model
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.train.complete import complete
from iecl_solo.train.keep import write_checkpoint
from iecl_solo.train.logs import read_log

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
PLAIN = sorted(set(METHOD_KWARGS) & set(HOST.methods))
CARRIED = [
    name
    for objectives in ((), ("iecl",), ("climb",), ("iecl", "climb"))
    for name in ("_".join([*objectives, plain]) for plain in PLAIN)
    # it clusters the whole data set before its first step, which one batch is not
    if name in HOST.methods and not name.endswith("deepclusterv2")
]


# ---- (a) any valid configuration builds, and takes a finite step

_OPTIONS: dict[str, dict[str, list[Any]]] = {
    "paper": {
        "activation": ["gelu", "leaky_relu", "relu", "silu", "softplus", "tanh"],
        "inner_skip": [True, False],
        "outer_skip": [True, False],
        "match_statistics": [True, False],
        "host_gradient": ["with", "without"],
    },
    "convex": {
        "activation": ["sigmoid", "softplus", "tanh"],
        "host_gradient": ["with", "without"],
    },
    "noise": {
        "noise_channels": [1, 4],
        "host_gradient": ["with", "without", "against"],
    },
}


@st.composite
def saibs(draw: Callable[[Any], Any]) -> dict[str, Any]:
    """A ``saib:`` block for images of 16 or 32 pixels; what is left out is the variant's own."""
    variant = draw(st.sampled_from(sorted(_OPTIONS)))
    shared: dict[str, list[Any]] = {"patch_size": [2, 4, 8], "expansion": [1, 2], "depth": [1, 2]}
    shared["positional_encoding"] = [True, False]
    options: dict[str, Any] = {"variant": variant}
    for name, values in {**shared, **_OPTIONS[variant]}.items():
        if draw(st.booleans()):
            options[name] = draw(st.sampled_from(values))
    return options


@st.composite
def objectives(draw: Callable[[Any], Any]) -> dict[str, Any]:
    weight = st.sampled_from([0.0, 0.01, 1.0])
    return {
        "iecl": {
            **{name: draw(weight) for name in ("beta", "lambda", "eta", "gamma")},
            # "anchor" is refused where no gradient would reach SAIB
            "placement": draw(st.sampled_from(["none", "query", "both"])),
            "saib": draw(saibs()),
            "generation": {
                "weight": draw(weight),
                "measure": draw(st.sampled_from(["patch", "jacobian"])),
            },
            "kl": {
                "space": draw(st.sampled_from(["input", "embedding"])),
                "covariance": draw(st.sampled_from([None, "full", "diagonal"])),
            },
            "entropy": {
                "estimator": draw(
                    st.sampled_from(["coding_rate", "gaussian", "knn", "renyi", "vmf_kde"])
                )
            },
            "regularizer": {
                "mode": draw(st.sampled_from(["penalty", "bilipschitz", "volume", "parametrize"]))
            },
        },
        "climb": {
            "beta": draw(st.sampled_from([None, 0.0, 0.01])),
            "num_components": draw(st.sampled_from([1, 4])),
        },
    }


def _queued(method: str) -> bool:
    return any("queue_size" in kw and method.endswith(plain) for plain, kw in METHOD_KWARGS.items())


@st.composite
def configurations(draw: Callable[[Any], Any]) -> dict[str, Any]:
    """A configuration as a person writes it, without data: they are ``images``."""
    method = draw(st.sampled_from(CARRIED))
    optimizer = draw(st.sampled_from(["sgd", "lars", "adam", "adamw"]))
    blocks = draw(objectives())
    size = draw(st.sampled_from([16, 32]))
    # queues hold whole batches, W-MSE whitens parts of them
    batch_sizes = [8, 16] if method.endswith("wmse") or _queued(method) else [8, 12]
    # torch's own kernels of a CPU give NaN for a map of 1x1 in bfloat16
    precisions = ["32-true", "bf16-mixed"] if size > 16 else ["32-true"]
    return {
        "method": method,
        "size": size,
        "optimizer__name": optimizer,
        "optimizer__batch_size": draw(st.sampled_from(batch_sizes)),
        "optimizer__lr": draw(st.sampled_from([1e-3, 0.1])),
        "scheduler__name": draw(st.sampled_from(["warmup_cosine", "none"])),
        "precision": draw(st.sampled_from(precisions)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        **{name: block for name, block in blocks.items() if name in method.split("_")},
    }


def _builds_and_steps(given: dict[str, Any], images: Path) -> None:
    given = copy.deepcopy(given)
    size = given.pop("size")
    raw = raw_config(given.pop("method"), images, max_epochs=1, **given)
    raw["augmentations"][0]["crop_size"] = size
    cfg = complete(OmegaConf.create(raw), HOST)
    seed_everything(cfg.seed, verbose=False)
    model = build_model(cfg, HOST)
    rows = cfg.optimizer.batch_size
    train_on(model, batches(1, rows, sizes=[size] * 2), precision=cfg.precision)
    logged: Trainer = model.trainer
    assert logged.global_step >= 1
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert bool(value.isfinite().all()), name


@settings(max_examples=4, suppress_health_check=FIXTURES)
@given(given_values=configurations())
def test_any_valid_configuration_builds_and_steps(
    given_values: dict[str, Any], images: Path, count: Count
):
    count("configurations fuzzed")
    _builds_and_steps(given_values, images)


@pytest.mark.robust
@settings(max_examples=120, suppress_health_check=FIXTURES)
@given(given_values=configurations())
def test_many_valid_configurations_build_and_step(
    given_values: dict[str, Any], images: Path, count: Count
):
    count("configurations fuzzed")
    _builds_and_steps(given_values, images)


# ---- (b) any single wrong key or value is one line


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


#: Of any text a name or a path may be; the disk and the registry say whether it is one.
_TEXTS = {"name", "dir", "train_path", "val_path"}
_ANYTHING = [[], {"a": 1}, float("nan")]


def _wrong(path: tuple[Any, ...], value: Any) -> list[Any]:
    """Values that cannot be meant, wherever a value of this kind is allowed."""
    if path[-1] in _TEXTS:
        return [{"a": 1}]
    if isinstance(value, bool):
        return [*_ANYTHING, "abc", 3.7]
    if isinstance(value, (int, float)):
        return [*_ANYTHING, "abc", -1e9, math.inf]
    if isinstance(value, str):
        return [*_ANYTHING, "no such name", 3.7]
    return []


def _misspelt(key: str) -> list[str]:
    return [f"{key}x", key[:-1], key[0] + key] if len(key) > 4 else []


def _mutants(images: Path) -> list[tuple[str, Callable[[dict[str, Any]], None]]]:
    """Each what is changed, and the change; of a configuration in which every block is written."""
    cfg = OmegaConf.to_container(complete(OmegaConf.create(_whole(images)), HOST))
    found: list[tuple[str, Callable[[dict[str, Any]], None]]] = []
    raw = _whole(images)
    blocks = {k: v for k, v in cfg.items() if k in ("iecl", "climb")}
    for path, value in [*_leaves(raw), *_leaves(blocks)]:
        if path[0] in blocks and value is None:
            continue
        for wrong in _wrong(path, value):
            found.append((f"{path}={wrong!r}", partial(_set, path=path, value=wrong)))
        if isinstance(path[-1], str) and len(path) > 1:
            for other in _misspelt(path[-1]):
                to = (*path[:-1], other)
                found.append((f"{to}", partial(_set, path=to, value=value)))
    return found


def _whole(images: Path) -> dict[str, Any]:
    return raw_config("iecl_climb_simclr", images, optimizer__kwargs={"momentum": 0.9}, seed=3)


def _set(cfg: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    at: Any = cfg
    for key in path[:-1]:
        if isinstance(at, dict) and key not in at:
            at[key] = {}
        at = at[key]
    at[path[-1]] = value


def _refused(change: Callable[[dict[str, Any]], None], images: Path) -> str:
    raw = _whole(images)
    change(raw)
    with pytest.raises(IECLError) as refused:
        build_model(complete(OmegaConf.create(raw), HOST), HOST)
    message = str(refused.value)
    assert message.strip() and "\n" not in message
    return message


# what is no error: a longer list of views' settings is a pipeline's own business, and so on
@settings(max_examples=40, suppress_health_check=FIXTURES)
@given(data=st.data())
def test_any_single_wrong_key_or_value_is_one_line(data: st.DataObject, images: Path, count: Count):
    _, change = data.draw(st.sampled_from(_mutants(images)))
    count("bad inputs tried")
    _refused(change, images)


@pytest.mark.robust
def test_every_single_wrong_key_or_value_is_one_line(images: Path, count: Count):
    accepted = []
    for what, change in _mutants(images):
        count("bad inputs tried")
        try:
            _refused(change, images)
        except BaseException as error:
            accepted.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
    assert accepted == []


# ---- (c) damaged bytes: one line, or what was written

_DAMAGE = st.tuples(
    st.sampled_from(["flip", "cut", "noise", "insert"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=64),
)


def damaged(whole: bytes, how: tuple[str, float, bytes]) -> bytes:
    """One bit the other way, the end gone, some bytes others, or some more."""
    kind, where, bytes_ = how
    out, place = bytearray(whole), int(where * len(whole))
    if kind == "flip":
        out[place] ^= 1 << (bytes_[0] % 8)
    elif kind == "cut":
        del out[place:]
    elif kind == "noise":
        out[place : place + len(bytes_)] = bytes_[: len(out) - place]
    else:
        out[place:place] = bytes_
    return bytes(out)


class _Checkpoint:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.ckpt"
        generator = torch.Generator().manual_seed(0)
        self.state = {f"w{i}": torch.randn(30, 30, generator=generator) for i in range(3)}
        write_checkpoint({"state_dict": self.state, "epoch": 3}, self.path, 1)

    def right(self) -> bool:
        found = read_checkpoint(self.path)
        same = found["state_dict"].keys() == self.state.keys() and found["epoch"] == 3
        return same and same_tensors(self.state, found["state_dict"]) == []


class _SAIB:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "saib.safetensors"
        self.saib = make_saib("paper", 16, patch_size=4)
        save_saib(self.saib, self.path)

    def right(self) -> bool:
        found = load_saib(self.path)
        own, other = self.saib.state_dict(), found.state_dict()
        return found.options == self.saib.options and same_tensors(own, other) == []


class _Row:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "rows")
        self.store.claim(
            {
                **{"id": "a", "data": "toy", "arm": "simclr", "method": "simclr"},
                **{"against": None, "axes": {"optimizer.lr": 0.1}, "seed": 0},
            }
        )
        self.store.finish("a", {"knn_acc1": 91.25, "kl": 0.125}, [(0, "loss", 5.5)], seconds=3.5)
        self.path = folder / "rows" / "a.json"
        self.known = self.store.rows()[0]

    def right(self) -> bool:
        (found,) = self.store.rows()
        return all(found[key] == value for key, value in self.known.items())


class _Monitor:
    """No check sum is in a CSV: it is read as numbers, or refused."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "monitor.csv"
        self.path.write_text("epoch,entropy_query,kl\n0,4.5,0.25\n10,4.75,0.5\n")

    def right(self) -> bool:
        frame = read_log(self.path)
        # without a row a column has no type
        return frame.empty or all(pd.api.types.is_numeric_dtype(frame[name]) for name in frame)


class _Rows:
    """Likewise ``rows.csv``, which a person may edit."""

    def __init__(self, folder: Path) -> None:
        self.path = _Row(folder).path.parent.with_suffix(".csv")
        Store(folder / "rows").export()

    def right(self) -> bool:
        _, rows = read_rows(self.path)
        values = [value for row in rows for value in row["metrics"].values()]
        return all(isinstance(value, float) for value in values)


FILES = {"checkpoint": _Checkpoint, "SAIB": _SAIB, "row": _Row, "monitor": _Monitor, "rows": _Rows}


def _one_line_or_right(kind: str, hows: list[Any], folder: Path, count: Count) -> int:
    made = FILES[kind](folder)
    whole = made.path.read_bytes()
    refused = 0
    for how in hows:
        made.path.write_bytes(damaged(whole, how))
        count("faults injected")
        try:
            assert made.right(), how
        except IECLError as error:
            assert "\n" not in str(error), error
            refused += 1
    made.path.write_bytes(whole)
    assert made.right()
    return refused


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=8, suppress_health_check=FIXTURES)
@given(hows=st.lists(_DAMAGE, min_size=12, max_size=12))
def test_damaged_bytes_are_one_line_or_what_was_written(
    kind: str, hows: list[Any], tmp_path_factory: pytest.TempPathFactory, count: Count
):
    _one_line_or_right(kind, hows, tmp_path_factory.mktemp("damaged"), count)


@pytest.mark.robust
@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=100, suppress_health_check=FIXTURES)
@given(hows=st.lists(_DAMAGE, min_size=12, max_size=12))
def test_much_damage_is_one_line_or_what_was_written(
    kind: str, hows: list[Any], tmp_path_factory: pytest.TempPathFactory, count: Count
):
    _one_line_or_right(kind, hows, tmp_path_factory.mktemp("damaged"), count)


@pytest.mark.parametrize("kind", ["SAIB", "row", "checkpoint"])
def test_every_flipped_bit_is_found(kind: str, tmp_path: Path, count: Count):
    """A file with a check sum: no flip in its content is read (every 7th byte, one bit)."""
    made = FILES[kind](tmp_path)
    length = len(made.path.read_bytes())
    step = max(7, length // 150)
    places = [
        (place / length, (place % 8).to_bytes(1, "little")) for place in range(0, length, step)
    ]
    hows = [("flip", where, bit) for where, bit in places]
    refused = _one_line_or_right(kind, hows, tmp_path, count)
    assert refused > 0.9 * len(hows)
