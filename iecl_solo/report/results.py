"""A store's rows, put in the order and the words of a report."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iecl_solo.evaluate.gallery import Gallery, read_gallery
from iecl_solo.evaluate.label_free import BETTER
from iecl_solo.experiments.store import COLUMNS, Store
from iecl_solo.report import figures
from iecl_solo.report.figures import Look
from iecl_solo.report.statistics import Difference, difference_table, paired_difference, pairs
from iecl_solo.report.tables import better, difference_unit, is_cost

BATCH_SIZE = "optimizer.batch_size"


def text(value: Any) -> str:
    """A setting's value, short.

    Example:
        >>> [text(v) for v in (128.0, 0.05, None, "sgd", [1, 2], float("nan"))]
        ['128', '0.05', '–', 'sgd', '[1, 2]', '–']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (float, np.floating)):
        return f"{value:g}"
    return str(value) if isinstance(value, (str, int, np.integer)) else json.dumps(value)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows as mappings."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def count(n: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{n} {noun}{'s' * (n != 1)}"


def listed(words: Sequence[str], most: int = 4) -> str:
    """Words as prose lists them.

    Example:
        >>> listed(["a", "b", "c"]), listed(list("abcdef"))
        ('a, b and c', 'a, b, c, d and 2 more')
    """
    if len(words) > most + 1:
        words = [*words[:most], f"{len(words) - most} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def slug(words: str) -> str:
    """A file's name, and an id in a page; words in other letters are told apart by a hash.

    Example:
        >>> slug("knn_acc1/stl10"), slug("knn_acc1/花"), slug("数据")
        ('knn-acc1-stl10', 'knn-acc1-4efae2cb', 'x-5440f742')
    """
    plain = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "x"
    # "–" is in no name: it is how `text` shows a setting without a value
    if words.replace("–", "").isascii():
        return plain
    return f"{plain}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Results:
    """A store's rows, those of the grid as it was last asked for.

    Attributes:
        meta: what the runner recorded of the benchmark.
        cells: one row a run, in the grid's order; ``setting`` is an index into ``settings``.
        runs: finished runs in long form: arm, against, seed, setting, device, measure, value.
        curves: the same over epochs: arm, seed, setting, name, epoch, value.
        axes: the grid's axes, by dotted key.
        settings: data set and value of each axis, as shown; all that a comparison shares but the
            seed.
        arms: in the order of the benchmark.
        missing: ids of the grid without a row.
        root: the folder that holds the runs.
    """

    meta: dict[str, Any]
    cells: pd.DataFrame
    runs: pd.DataFrame
    curves: pd.DataFrame
    axes: list[str]
    settings: list[tuple[str, ...]]
    arms: list[str]
    missing: list[str]
    root: Path

    def folder(self, cell: Mapping[str, Any]) -> Path | None:
        """The folder of a cell's run, None where it is not there (any more)."""
        config = cell["config"]
        if not isinstance(config, dict) or "name" not in config:
            return None
        given = Path(str((config.get("checkpoint") or {}).get("dir") or "."))
        below = Path(str(config.get("method"))) / str(config["name"])
        # the report of one variant of several is one folder below the runs
        for runs in (self.root / "runs", self.root.parent / "runs", given):
            if (runs / below).is_dir():
                return runs / below
        return None

    @cached_property
    def galleries(self) -> list[tuple[int, str, Any, Gallery]]:
        """(setting, arm, seed, gallery) of the first seed that has one, for each arm."""
        found: dict[tuple[int, str], tuple[int, str, Any, Gallery]] = {}
        for cell in records(self.cells[self.cells["status"] == "done"]):
            key = cell["setting"], cell["arm"]
            folder = self.folder(cell) if key not in found else None
            gallery = read_gallery(folder) if folder is not None else None
            if gallery is not None:
                found[key] = (*key, cell["seed"], gallery)
        return [found[key] for key in sorted(found, key=lambda k: (k[0], self.arms.index(k[1])))]

    @property
    def unlabelled(self) -> bool:
        """Whether the runs had no labels, so that none has an accuracy."""
        configs = [config.get("data") or {} for config in self.configured["config"]]
        accuracies = self.runs["measure"].str.contains("_acc").any()
        return bool(configs) and all(d.get("no_labels") for d in configs) and not accuracies

    @cached_property
    def against(self) -> dict[str, str | None]:
        """What each arm is compared with."""
        pair = self.cells.drop_duplicates("arm")
        both = zip(pair["arm"], pair["against"], strict=True)
        return {arm: other if isinstance(other, str) else None for arm, other in both}

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each arm is drawn."""
        return figures.looks(self.arms, self.against)

    @cached_property
    def configured(self) -> pd.DataFrame:
        """The cells whose completed configuration is known."""
        known = [isinstance(config, dict) for config in self.cells["config"]]
        return self.cells.loc[np.array(known, dtype=bool)]

    @cached_property
    def measures(self) -> list[str]:
        """What is tabulated, the primary one first: as the benchmark says, of what there is."""
        there = set(self.runs["measure"])
        asked = [m for m in self.meta.get("measures") or [] if m in there]
        if self.unlabelled:  # those come first that say how good a representation is
            asked = list(dict.fromkeys([*(m for m in BETTER if m in there), *asked]))
        return asked or sorted((m for m in there if better(m) > 0), key=lambda m: "/" in m)

    @property
    def primary(self) -> str | None:
        """The measure that the answer is about: the benchmark's first, there yet or not."""
        asked = self.measures if self.unlabelled else self.meta.get("measures") or self.measures
        return asked[0] if asked else None

    @property
    def tested(self) -> str | None:
        """The first measure that is no cost: what figures of one measure are of."""
        return next((m for m in self.measures if not is_cost(m)), None)

    @property
    def seeds(self) -> int:
        """Seeds of the grid."""
        return len(self.meta.get("seeds") or self.cells["seed"].unique())

    def of(self, measure: str) -> pd.DataFrame:
        """The runs' values of one measure."""
        return self.runs[self.runs["measure"] == measure]

    def values(self, measure: str, setting: int, arm: str) -> pd.Series:
        """Its values over the seeds of one arm in one setting."""
        runs = self.of(measure)
        return runs[(runs["setting"] == setting) & (runs["arm"] == arm)]["value"]

    @cached_property
    def differences(self) -> dict[str, pd.DataFrame]:
        """``difference_table`` of each measure, in the grid's order."""
        found = {}
        for measure in self.measures:
            table = difference_table(self.of(measure), ["setting"], difference_unit(measure))
            order = table["arm"].map(self.arms.index) if len(table) else None
            table = table.assign(order=order)
            found[measure] = table.sort_values(["setting", "order"], ignore_index=True)
        return found

    def axis_name(self, key: str) -> str:
        """The axis's last word, or its whole key where another ends alike."""
        last = key.rpartition(".")[2]
        alone = sum(axis.rpartition(".")[2] == last for axis in self.axes) == 1
        return last.replace("_", " ") if alone else key

    @property
    def setting_head(self) -> list[str]:
        """Headings of a setting's columns."""
        return ["data", *map(self.axis_name, self.axes)]

    def setting_text(self, setting: int, varying: bool = False) -> str:
        """A setting in words; with ``varying`` only what differs between settings."""
        values = self.settings[setting]
        parts = []
        for i, (head, value) in enumerate(zip(self.setting_head, values, strict=True)):
            if varying and len({other[i] for other in self.settings}) == 1:
                continue
            parts.append(f"{head} {value}" if i else value)
        return ", ".join(parts)

    def setting_columns(self, setting: int) -> dict[str, str]:
        """A setting's columns in a CSV, by full key."""
        return dict(zip(["data", *self.axes], self.settings[setting], strict=True))


def data_name(given: str, config: Any) -> str:
    """What a run's data set is called: a folder of images by the folder's name, not "custom".

    Args:
        given: as the store has it.
        config: the run's completed configuration, None before it has finished.

    Example:
        >>> data_name("custom", {"data": {"train_path": "datasets/digits/train"}})
        'digits'
        >>> data_name("custom", {"data": {"train_path": "/photos/holiday"}})
        'holiday'
        >>> data_name("cifar10", None)
        'cifar10'
    """
    path = config.get("data", {}).get("train_path") if isinstance(config, dict) else None
    if given != "custom" or not isinstance(path, str):
        return given
    parts = [p for p in Path(path).parts if p.lower() not in ("train", "training", "images", "/")]
    return parts[-1] if parts and parts[-1] not in (".", "..") else given


def _named_data(cells: pd.DataFrame) -> pd.DataFrame:
    given = cells["data"]
    names = [data_name(d, c) for d, c in zip(given, cells["config"], strict=True)]
    # under the name of another data set the two would be one setting, and their runs crossed
    if any(d != n and n in set(given) for d, n in zip(given, names, strict=True)):
        return cells
    # a run that has not finished goes by the name of those that have, of the same data
    known = {d: n for d, n in zip(given, names, strict=True) if d != n}
    return cells.assign(data=[known.get(n, n) for n in names])


#: Top-5 accuracy of no more classes than this is 100 %, and says nothing.
_TOP5 = 5


def _telling(runs: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The rows without top-5 accuracies where there are five classes or fewer."""
    classes = {
        cell: (config.get("data") or {}).get("num_classes")
        for cell, config in zip(cells["id"], cells["config"], strict=True)
        if isinstance(config, dict)
    }
    few = {cell for cell, n in classes.items() if isinstance(n, int) and n <= _TOP5}
    # on another data set ("/NAME") the classes are others, and the evaluation leaves it out
    return runs[~(runs["measure"].str.contains(r"_acc5$") & runs["cell"].isin(few))]


def read(store: Store) -> Results:
    """Everything in a store that is of the current grid; nothing need be there."""
    meta, cells = store.meta(), store.cells()
    wanted = meta.get("cells")
    missing: list[str] = []
    if wanted is not None:
        place = {cell: i for i, cell in enumerate(wanted)}
        missing = [cell for cell in wanted if cell not in set(cells["id"])]
        cells = cells[cells["id"].isin(place)]
        cells = cells.sort_values("id", key=lambda ids: ids.map(place))
    cells = _named_data(cells)
    axes = [axis for axis in meta.get("axes") or {} if axis in cells or cells.empty]
    others = (c for c in cells.columns if c not in (*COLUMNS, *axes))
    axes += [c for c in others if cells[c].notna().any()]
    keys = [(str(row["data"]), *(text(row.get(axis)) for axis in axes)) for row in records(cells)]
    settings = list(dict.fromkeys(keys))
    cells = cells.assign(setting=[settings.index(key) for key in keys])
    present = list(dict.fromkeys(cells["arm"]))
    arms = [arm for arm in meta.get("arms") or {} if arm in present]
    arms += [arm for arm in present if arm not in arms]
    done = cells[cells["status"] == "done"]
    done = done[["id", "arm", "against", "seed", "setting", "device"]]
    done = done.rename(columns={"id": "cell"}).astype({"cell": object})  # also where it is empty
    runs = done.merge(store.metrics().rename(columns={"name": "measure"}), on="cell")
    runs = _telling(runs, cells)
    curves = done.merge(store.curves(), on="cell")
    for frame in (runs, curves):
        frame["value"] = pd.to_numeric(frame["value"]).astype("float64")
    return Results(meta, cells, runs, curves, axes, settings, arms, missing, store.path.parent)


def groups(results: Results, axis: str) -> dict[tuple[str, ...], list[tuple[float, int]]]:
    """(value of an axis, setting) by what else a setting is; numeric values only, ascending."""
    column = 1 + results.axes.index(axis)
    found: dict[tuple[str, ...], list[tuple[float, int]]] = {}
    for i, setting in enumerate(results.settings):
        try:
            value = float(setting[column])
        except ValueError:
            continue
        found.setdefault(setting[:column] + setting[column + 1 :], []).append((value, i))
    return {rest: sorted(values) for rest, values in found.items()}


def slopes(
    results: Results,
    measure: str,
    settings: Mapping[tuple[str, ...], Sequence[tuple[float, int]]],
) -> dict[tuple[str, str], Difference]:
    """Change of a paired difference when the batch size doubles.

    Args:
        results: the rows.
        measure: what the difference is of.
        settings: (batch size, setting) by what else a setting is, as ``groups`` has them.

    Returns:
        By arm and baseline: per seed the mean over ``settings`` at each size and its least-squares
        slope over log2 of the size, then the slopes' mean over the seeds that have all of it. A
        data set (or what else ``settings`` tells apart) without some size is left out, as it would
        move the mean at the other sizes alone; so is an arm with fewer than two sizes.
    """
    place = {i: (n, x) for n, at in enumerate(settings.values()) for x, i in at if x > 0}
    both = pairs(results.of(measure), ["setting"])
    both = both[both["setting"].isin(place)]
    both = both.assign(
        d=both["value"] - both["baseline"],
        rest=[place[i][0] for i in both["setting"]],
        size=[place[i][1] for i in both["setting"]],
    )
    found = {}
    for (arm, other), group in both.groupby(["arm", "against"], sort=False):
        sizes = group.groupby("rest")["size"].nunique()
        whole = sizes.index[sizes == group["size"].nunique()]
        wide = group[group["rest"].isin(whole)]
        wide = wide.pivot_table(index="seed", columns=["size", "rest"], values="d").dropna()
        if len(wide) and group["size"].nunique() > 1:
            by_size = wide.T.groupby(level="size").mean()
            x = np.log2(by_size.index.to_numpy(dtype=float))
            each = np.polyfit(x, by_size.to_numpy(), 1)[0]
            found[str(arm), str(other)] = paired_difference(each, np.zeros(len(each)))
    return found


def cost_rows(results: Results) -> list[dict[str, Any]]:
    """Medians over runs of every cost measure, by setting, arm and device."""
    runs = results.runs[results.runs["measure"].map(is_cost).astype(bool)]
    if runs.empty:
        return []
    runs = runs.assign(device=runs["device"].fillna("–"))
    wide = runs.pivot_table(
        index=["setting", "arm", "device"], columns="measure", values="value", aggfunc="median"
    ).reset_index()
    wide = wide.assign(order=[results.arms.index(arm) for arm in wide["arm"]])
    wide = wide.sort_values(["device", "setting", "order"]).drop(columns="order")
    wanted = ["time_ratio", "memory_ratio", "time_ratio_low", "time_ratio_high"]
    return records(wide.reindex(columns=[*wide.columns, *(w for w in wanted if w not in wide)]))
