"""A benchmark's YAML as cells, and a cell as the configuration that ``pretrain`` takes."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iecl_solo import checks
from iecl_solo.digits import write_digits, write_masks
from iecl_solo.errors import IECLError, one_line, unknown_name
from iecl_solo.experiments.throughput import available
from iecl_solo.solo import schema
from iecl_solo.solo.config import flatten, parse_block, plain
from iecl_solo.solo.registry import OBJECTIVES, choose_objectives
from iecl_solo.train.compose import compose_pretrain, own_yaml

KINDS = ("training", "cost", "throughput")


#: Keys that a run has and no axis may: what says them.
_NO_AXES = {
    **{"seed": "seeds of the benchmark", "method": "arms of the benchmark"},
    **{"name": "the cell's id", "checkpoint.dir": "dir of the benchmark"},
    **dict.fromkeys(("checkpoint", "checkpoint.enabled", "checkpoint.frequency"), "the benchmark"),
}


@dataclass
class BenchmarkConfig:
    """A benchmark: arms x data sets x axes x seeds, and how the runs are evaluated.

    Attributes:
        name: what its folder is called.
        question: what it answers, in one sentence.
        kind: training, cost (A/B step times, nothing is trained), or throughput (images a second;
            arms are pipelines of views, data sets are networks).
        preset: which of ``presets`` fills in what is not given.
        presets: by name, values for the keys below.
        dir: its folder; ``benchmark/<name>-<preset>`` if not given.
        data: by name: ``config``, a folder of packaged pretraining configs or the path of a YAML;
            ``overrides``, a list in Hydra's grammar; ``settings`` merged over the configuration;
            ``digits``, {folder, classes, rest, masks}: scikit-learn's digits are written there and
            used; those that are not in ``classes`` into the folder ``rest``, to carry over to; and
            with their masks into the folder ``masks``, for ``evaluation.dense``.
        settings: merged over the configuration of every run.
        arms: by name: ``method``, settings merged over the configuration, and optionally
            ``against``, the arm that it is compared with (the first one if not given, null for
            none), and ``saib_from``: {arm, data, prob}, whose learned SAIB is an augmentation here.
        axes: dotted key: its values. Arms are compared within each combination.
        seeds: a baseline and its variants share one seed's weights, batches and views.
        measures: what the report tabulates; the first one is what the answer is about.
        evaluation: see ``iecl_solo.evaluate.protocol``.
        published: the papers' own figures: data, axes, arm, measure, value, source.
        rounds: timed steps of each arm, for cost.
        threads: of torch, so that a row does not depend on the launcher; null leaves it alone.
        rows: a ``rows.csv`` of finished cells; only the others are run.
        cell: the id of the only cell to run; what launchers hand on.
    """

    name: str = "???"
    question: str = "???"
    kind: str = "training"
    preset: str = "paper"
    presets: dict[str, Any] = field(default_factory=dict)
    dir: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    measures: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    published: list[Any] = field(default_factory=list)
    rounds: int = 20
    threads: int | None = None
    rows: str | None = None
    cell: str | None = None


@dataclass
class DigitsConfig:
    """``data.NAME.digits``: which of scikit-learn's digits are written, and where."""

    folder: str = ""
    classes: list[int] | None = None
    rest: str | None = None
    masks: str | None = None


@dataclass
class DataConfig:
    """``data.NAME``: a pretraining configuration, and what is set in it."""

    config: str = ""
    overrides: list[str] | None = None
    settings: dict[str, Any] | None = None
    digits: dict[str, Any] | None = None


@dataclass
class SourceConfig:
    """``arms.NAME.saib_from``: whose learned SAIB is an augmentation, of what probability."""

    arm: str = ""
    data: str = ""
    prob: float = 0.5


@dataclass
class PublishedConfig:
    """``published``: a paper's own figure, of one data set, arm and measure."""

    data: str = ""
    axes: dict[str, Any] = field(default_factory=dict)
    arm: str = ""
    measure: str = ""
    value: Any = None
    source: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        id: readable, and different whenever a setting is.
        data: name of the data set.
        arm: name of the arm.
        against: the arm that it is compared with.
        method: of the registry, with the objectives that are chosen for it.
        axes: this cell's value of each axis.
        seed: shared by an arm and the one it is compared with.
        source: id of the cell whose SAIB this one takes, None for most.
    """

    id: str
    data: str
    arm: str
    against: str | None
    method: str
    axes: dict[str, Any]
    seed: int
    source: str | None = None

    def row(self) -> dict[str, Any]:
        """What ``Store.claim`` takes."""
        return {k: v for k, v in asdict(self).items() if k != "source"}


def _no_repeats(key: str, values: list[Any]) -> None:
    """Each value is a run, or a table."""
    for value in values:
        if values.count(value) > 1:
            raise IECLError(f"{key}: {value} is given twice")


def _check_axes(axes: Mapping[str, Any]) -> None:
    for key, values in axes.items():
        if key in _NO_AXES:
            raise IECLError(f"axes.{key}: it is no axis, {_NO_AXES[key]} says it")
        if not isinstance(values, list) or not values:
            raise IECLError(f"axes.{key}: {values!r} is not a list of values")
        _no_repeats(f"axes.{key}", values)


def _parse(where: str, config_class: type[Any], block: Any, required: Sequence[str]) -> Any:
    parsed = parse_block(where, config_class, {} if block is None else block)
    for key in required:
        if getattr(parsed, key) in ("", None):
            raise IECLError(f"{where}: no {key} is given")
    return parsed


def _check_data(blocks: Mapping[str, Any]) -> None:
    for name, data in blocks.items():
        where = f"data.{name}"
        given = data if isinstance(data, Mapping) else {}
        overrides = given.get("overrides")
        texts = isinstance(overrides, list) and all(isinstance(o, str) for o in overrides)
        if overrides is not None and not texts:
            raise checks.refusal(f"{where}.overrides", overrides, "a list of overrides")
        for key in ("settings", "digits"):
            if not isinstance(given.get(key) or {}, Mapping):
                raise IECLError(f"{where}.{key}: {given[key]!r} is not a block of keys")
        digits = _parse(where, DataConfig, data, ["config"]).digits
        if digits is not None:
            made = _parse(f"{where}.digits", DigitsConfig, digits, ["folder"])
            if made.rest is not None and made.classes is None:
                raise IECLError(f"{where}.digits.rest: no classes are given, so that none are left")


def _check_arms(arms: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    for name, arm in arms.items():
        if not isinstance(arm, dict) or "method" not in arm:
            raise IECLError(f"arms.{name}: no method is given")
        other = arm.get("against")
        if other is not None and other not in arms:
            raise IECLError(f"arms.{name}.against: {unknown_name('arm', other, arms)}")
        if other == name:
            raise IECLError(f"arms.{name}.against: an arm is not compared with itself")
        if arm.get("saib_from") is not None:
            where = f"arms.{name}.saib_from"
            source = _parse(where, SourceConfig, arm["saib_from"], ["arm", "data"])
            checks.number(f"{where}.prob", source.prob, 0, 1)
            if source.arm not in arms:
                raise IECLError(f"{where}.arm: {unknown_name('arm', source.arm, arms)}")
            if source.data not in data:
                raise IECLError(f"{where}.data: {unknown_name('data set', source.data, data)}")
            if source.arm == name:
                raise IECLError(f"{where}.arm: {name} cannot be its own source")


def _check_published(entries: Sequence[Any]) -> None:
    """All but the arms, of which a command may leave one out."""
    for i, entry in enumerate(entries):
        where = f"published.{i}"
        parsed = _parse(where, PublishedConfig, entry, ["data", "arm", "measure"])
        checks.number(f"{where}.value", parsed.value)


def read_benchmark(cfg: Mapping[str, Any] | DictConfig) -> BenchmarkConfig:
    """Check a benchmark's YAML, the chosen preset filled in.

    What is given at the top level, in the YAML or on the command line, is merged over the preset.

    Raises:
        IECLError: one line: the key, what was given, what is allowed, the nearest valid name.

    Example:
        >>> benchmark = read_benchmark({
        ...     "name": "b", "question": "?", "preset": "smoke",
        ...     "presets": {"smoke": {"seeds": [0, 1], "settings": {"max_epochs": 2}}},
        ...     "data": {"digits": {"config": "digits"}}, "measures": ["knn_acc1"],
        ...     "arms": {"simclr": {"method": "simclr"}}, "settings": {"max_epochs": 3}})
        >>> benchmark.seeds, benchmark.settings
        ([0, 1], {'max_epochs': 3})
    """
    given = dict(plain(cfg))
    presets, preset = given.get("presets") or {}, given.get("preset", BenchmarkConfig.preset)
    if presets and preset not in presets:
        raise unknown_name("preset", preset, presets)
    # null undoes what a preset says, where a key may be null
    nullable = [f.name for f in fields(BenchmarkConfig) if f.default is None]
    own = {
        k: v
        for k, v in given.items()
        if v != "???" and k != "presets" and (v is not None or k in nullable)
    }
    merged = OmegaConf.merge(presets.get(preset) or {}, own)
    benchmark = parse_block("benchmark", BenchmarkConfig, plain(merged))
    benchmark.presets = plain(presets)
    for key in ("name", "question", "arms", "data", "seeds", "measures"):
        if getattr(benchmark, key) in ("???", {}, []):
            raise IECLError(f"{key}: no value is given (preset {preset})")
    if Path(benchmark.name).name != benchmark.name:
        raise IECLError(f"name: {benchmark.name!r} is not allowed, a folder's name is")
    if benchmark.kind not in KINDS:
        raise unknown_name("kind", benchmark.kind, KINDS)
    _no_repeats("measures", benchmark.measures)
    _no_repeats("seeds", benchmark.seeds)
    checks.whole("rounds", benchmark.rounds, 2)  # a ratio's quartiles take two at least
    if benchmark.threads is not None:
        checks.whole("threads", benchmark.threads, 1)
    if benchmark.kind == "throughput":
        benchmark.arms = available(benchmark.arms)
    # a key with dots in the YAML is a nested one on the command line, where the later counts
    benchmark.axes = flatten(benchmark.axes)
    _check_axes(benchmark.axes)
    _check_data(benchmark.data)
    _check_arms(benchmark.arms, benchmark.data)
    _check_published(benchmark.published)
    benchmark.dir = benchmark.dir or f"benchmark/{benchmark.name}-{benchmark.preset}"
    return benchmark


def cells(benchmark: BenchmarkConfig) -> list[Cell]:
    """All cells, those that others depend on first."""
    found: dict[tuple[Any, ...], Cell] = {}
    seen: dict[str, Cell] = {}
    baseline = next(iter(benchmark.arms))
    arms = sorted(benchmark.arms.items(), key=lambda item: item[1].get("saib_from") is not None)
    combinations = list(itertools.product(*benchmark.axes.values()))
    for seed, (arm, block), data, values in itertools.product(
        benchmark.seeds, arms, benchmark.data, combinations
    ):
        axes = dict(zip(benchmark.axes, values, strict=True))
        place = json.dumps(values, sort_keys=True)  # values may be blocks and lists
        source = None
        if block.get("saib_from") is not None:
            wanted = (seed, block["saib_from"]["arm"], block["saib_from"]["data"], place)
            if wanted not in found:  # it takes another arm's SAIB itself
                raise IECLError(f"arms.{arm}.saib_from: no arm {wanted[1]} on data {wanted[2]}")
            source = found[wanted].id
        against = block.get("against", baseline if arm != baseline else None)
        cell = Cell(
            _id(benchmark, arm, data, axes, seed),
            data,
            arm,
            against,
            _method(benchmark, data, axes, block),
            axes,
            seed,
            source,
        )
        if (other := seen.setdefault(cell.id, cell)) is not cell:
            what = ("arms", "arm") if other.arm != arm else ("data", "data")
            names = " and ".join(repr(getattr(c, what[1])) for c in (other, cell))
            raise IECLError(f"{what[0]}: {names} name the same cell {cell.id}; rename one")
        found[seed, arm, data, place] = cell
    return list(found.values())


def _method(
    benchmark: BenchmarkConfig, data: str, axes: Mapping[str, Any], arm: Mapping[str, Any]
) -> str:
    """The name under which a cell's method is registered: what it carries is in it."""
    cfg = OmegaConf.create({"method": arm["method"]})
    for block in (benchmark.data[data].get("settings") or {}, benchmark.settings, axes, arm):
        if "objectives" in block:
            cfg.objectives = block["objectives"]
    choose_objectives(cfg)
    return str(cfg.method)


def _id(benchmark: BenchmarkConfig, arm: str, data: str, axes: Mapping[str, Any], seed: int) -> str:
    settings: list[Any] = [benchmark.settings, benchmark.arms[arm], benchmark.data[data], axes]
    settings += [seed, benchmark.evaluation, benchmark.kind]
    own = own_yaml(str(benchmark.data[data]["config"]))
    if own is not None and own.is_file():  # what it says, which may change under its name
        settings.append(OmegaConf.to_container(OmegaConf.load(own)))
    if benchmark.kind != "training":  # these change what is measured, and nothing that is trained
        settings += [benchmark.rounds, benchmark.threads]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    short = [f"{key.rpartition('.')[2]}{_word(value)}" for key, value in axes.items()]
    words = "-".join([data, arm, *short, f"seed{seed}"])
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', words)}-{digest.hexdigest()[:8]}"


def _word(value: Any) -> str:
    """An axis's value in an id: a block or a list cut short, since an id is a file's name."""
    if not isinstance(value, (dict, list)):
        return str(value)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", json.dumps(value))[:24].strip("_")


def write_data(benchmark: BenchmarkConfig) -> None:
    """Write the data sets that can be made here, unless they are there."""
    for data in benchmark.data.values():
        if data.get("digits") is not None:
            given = parse_block("digits", DigitsConfig, data["digits"])
            made = write_digits(given.folder, classes=given.classes)
            if given.rest is not None:
                write_digits(given.rest, classes=sorted({*range(10)} - {*given.classes}))
            if given.masks is not None:
                write_masks(made, given.masks)


def _check_key(where: str, key: str, composed: list[str]) -> None:
    """Refuse a key that no one reads: each of its values would be the same run again."""
    if any(own == key or own.startswith(f"{key}.") for own in composed):
        return
    blocks = tuple(objective.name for objective in OBJECTIVES)
    if schema.knows(key, blocks) or key == "threads":  # which throughput reads
        return
    parent, _, last = key.rpartition(".")
    beside = {own.removeprefix(f"{parent}.") for own in composed if own.startswith(f"{parent}.")}
    names = {own.partition(".")[0] for own in (beside if parent else composed)}
    near = difflib.get_close_matches(last, names, 1, 0.8)
    hint = f" did you mean '{near[0]}'?" if near else " no run reads it"
    raise IECLError(f"unknown key {where}{key}:{hint}")


def configuration(benchmark: BenchmarkConfig, cell: Cell) -> DictConfig:
    """The cell's pretraining configuration, as composed: packaged or own, then what is set.

    Settings are merged in this order: the data set's, the benchmark's, the axes', the arm's.

    Raises:
        IECLError: one line, when it cannot be composed.
    """
    data = benchmark.data[cell.data]
    config, overrides = str(data["config"]), list(data.get("overrides") or [])
    try:
        # the packaged one is of the method alone; its objectives are chosen on the way to training
        cfg = compose_pretrain(config, str(benchmark.arms[cell.arm]["method"]), overrides)
    except IECLError as error:
        raise IECLError(f"data.{cell.data}.config: {error}") from None
    except Exception as error:  # Hydra's are many
        raise IECLError(f"cell {cell.id}: {one_line(error.__cause__ or error)}") from None
    OmegaConf.set_struct(cfg, False)
    arm = dict(benchmark.arms[cell.arm])
    arm.pop("against", None)
    arm.pop("saib_from", None)
    made = {}
    if data.get("digits") is not None:
        folder = data["digits"]["folder"]
        made = {"data.train_path": f"{folder}/train", "data.val_path": f"{folder}/test"}
    composed = list(flatten(dict(OmegaConf.to_container(cfg))))  # type: ignore[arg-type]
    for where, block in (
        ("", made),
        (f"data.{cell.data}.settings.", data.get("settings") or {}),
        ("settings.", benchmark.settings),
        ("axes.", cell.axes),
        (f"arms.{cell.arm}.", arm),
    ):
        for key, value in flatten(block).items():
            _check_key(where, key, composed)
            OmegaConf.update(cfg, key, value, force_add=True)
    cfg.seed = cell.seed
    return cfg
