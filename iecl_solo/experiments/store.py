"""A benchmark's rows: one file a cell, one CSV of all, for many writers on one file system.

The facts of a trained cell are in its run's folder; those of a cell that measures cost are its row.
A benchmark's folder holds::

    runs/<method>/<cell>/        what training and evaluation left (see ``iecl_solo.train.run``)
    rows/<cell>.json             the cell's row, written whole or not at all
    rows/<cell>.lock             who runs the cell now
    rows/_benchmark.json         what was asked: name, question, arms, axes, measures, ...
    rows.csv                     the finished rows, rewritten after each cell; to be committed

No file is written by two cells, and none is locked by the kernel, so the folder may lie on NFS. A
row that is lost is made again of its run (``iecl_solo.experiments.cell``).

``rows.csv`` is in long form, one line a measure: id, data, arm, against, method, axes (JSON),
seed, device, seconds, measure, value, versions (JSON, on a cell's first line). Its first line is a
comment that holds ``_benchmark.json``: ``pandas.read_csv("rows.csv", skiprows=1)`` leaves it out.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from iecl_solo.errors import IECLError
from iecl_solo.files import read_summed, replacing, write_summed

STORE = "rows"

#: Seconds without a sign of life after which a cell that runs on another machine is taken over. On
#: this machine the process is looked up, by its id and when it was started.
STALE = 180.0

_META = "_benchmark.json"
_IDENTITY = ("id", "data", "arm", "against", "method", "axes", "seed")
#: Columns of ``Store.cells``, the axes aside.
COLUMNS = (
    *("id", "data", "arm", "against", "method", "seed", "status", "error", "owner", "heartbeat"),
    *("seconds", "device", "config", "versions", "command"),
)
_CSV = (*_IDENTITY, "device", "seconds", "measure", "value", "versions")
_COMMENT = "# "


class Store:
    """A benchmark's rows; any number of processes may write to one folder at once.

    A cell is one run of the grid. It is claimed before it is run, so that no two workers run it,
    and its row is there whole once it is done. A claim whose process is gone counts for nothing, so
    that after a crash or a kill the cell is simply run again.

    Args:
        path: the folder; made if it is not there.
        create: whether it may be made.

    Raises:
        IECLError: one line, if the folder is not there or cannot be made.

    Example:
        >>> import tempfile
        >>> store = Store(Path(tempfile.mkdtemp()) / "rows")
        >>> store.claim({"id": "a", "data": "digits", "arm": "simclr", "method": "simclr",
        ...              "against": None, "axes": {"optimizer.batch_size": 128}, "seed": 0})
        True
        >>> store.finish("a", {"knn_acc1": 95.0}, [(0, "loss", 5.1)], seconds=3.0)
        >>> store.cells()[["arm", "optimizer.batch_size", "seed", "status"]].values.tolist()
        [['simclr', 128, 0, 'done']]
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise IECLError(f"store {path}: it is a file; a folder of rows is expected")
        if not create and not self.path.is_dir():
            raise IECLError(f"store {path}: no such folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IECLError(f"store {path}: it cannot be made ({error.strerror})") from None
        self._claims: dict[str, SoftFileLease] = {}

    @property
    def csv(self) -> Path:
        """The finished rows in one file, beside the folder."""
        return self.path.with_suffix(".csv")

    def begin(self, meta: Mapping[str, Any], fixed: Iterable[str] = ()) -> None:
        """Record what the benchmark is.

        Args:
            meta: JSON-able values by name.
            fixed: names whose value must be what the store holds already, if it does.

        Raises:
            IECLError: when the store is of another benchmark.
        """
        old = self.meta()
        for name in fixed:
            if name in old and old[name] != json.loads(json.dumps(meta[name])):
                raise IECLError(
                    f"{self.path} holds a benchmark with another {name} ({old[name]} there, "
                    f"{meta[name]} here); give another dir=... or delete it"
                )
        write_summed(self.path / _META, {**old, **meta})

    def clear(self) -> None:
        """Forget every row; the runs, of which they are made anew, stay."""
        for row in self.rows():
            self._file(row["id"]).unlink(missing_ok=True)
        (self.path / _META).unlink(missing_ok=True)

    def claim(self, cell: Mapping[str, Any]) -> bool:
        """Make a cell this process's, unless it is done or a living process has it.

        Args:
            cell: id, data, arm, against (an arm or None), method, axes (a mapping), seed.
        """
        name = str(cell["id"])
        if self._status(name) == "done" or not self._acquire(name):
            return False
        if self._status(name) == "done":  # by whoever held it a moment ago
            self.release(name)
            return False
        owner = f"{platform.node()}:{self._claims[name].pid}"
        row = {key: cell[key] for key in _IDENTITY}
        self._write({**row, "status": "running", "owner": owner, "heartbeat": time.time()})
        return True

    def _acquire(self, name: str) -> bool:
        if name in self._claims:
            return True
        marker = self.path / f"{name}.lock"
        lease = SoftFileLease(marker, lease_duration=STALE, is_singleton=False, thread_local=False)
        try:
            try:
                lease.acquire(timeout=0)
            except Timeout:
                if time.time() - marker.stat().st_mtime < STALE:
                    return False
                lease.acquire(timeout=1.5 * STALE)  # it must be seen to be silent, clocks differ
        except (Timeout, LeaseSettingsMismatch, FileNotFoundError):
            return False
        self._claims[name] = lease
        return True

    def release(self, name: str) -> None:
        """Let others have a cell that this process claimed; a rerun goes on with it."""
        lease = self._claims.pop(name, None)
        if lease is not None:
            lease.release()

    def finish(
        self,
        cell: str,
        metrics: Mapping[str, float],
        curves: Iterable[tuple[int, str, float]] = (),
        **columns: Any,
    ) -> None:
        """Record a cell's measures, all of them or none.

        Args:
            cell: its id.
            metrics: value by name.
            curves: (epoch, name, value).
            columns: seconds, wall (seconds with evaluation), device, command; config and versions
                as mappings.
        """
        row = self._row(cell)
        row |= {**columns, "metrics": dict(metrics), "curves": [list(point) for point in curves]}
        self._write({**row, "status": "done", "error": None})
        self.release(cell)

    def fail(self, cell: str, error: str) -> None:
        """Record why a cell could not be run; a rerun tries it again."""
        self._write({**self._row(cell), "status": "failed", "error": error})
        self.release(cell)

    def put(self, row: Mapping[str, Any]) -> None:
        """Take in a finished row from elsewhere, as ``read_rows`` gives it."""
        self._write({**row, "status": "done", "error": None})

    def _file(self, cell: str) -> Path:
        _check_id(str(self.path), cell)
        return self.path / f"{cell}.json"

    def _write(self, row: Mapping[str, Any]) -> None:
        write_summed(self._file(row["id"]), row)

    def _row(self, cell: str) -> dict[str, Any]:
        return _read_row(self._file(cell))

    def _status(self, cell: str) -> str | None:
        return self._row(cell)["status"] if self._file(cell).is_file() else None

    def rows(self) -> list[dict[str, Any]]:
        """Every cell's row by the order of ids; without ``metrics`` and ``curves`` until done."""
        files = sorted(self.path.glob("*.json"), key=lambda path: path.stem)
        return [_read_row(path) for path in files if path.name != _META]

    def meta(self) -> dict[str, Any]:
        """What ``begin`` recorded."""
        path = self.path / _META
        return _checked_meta(str(path), read_summed(path)) if path.is_file() else {}

    def done(self) -> set[str]:
        """Ids of the finished cells."""
        return {row["id"] for row in self.rows() if row["status"] == "done"}

    def cells(self) -> pd.DataFrame:
        """One row a cell; each axis of the grid is a column of its own, by its dotted key."""
        rows = self.rows()
        frame = pd.DataFrame([[row.get(name) for name in COLUMNS] for row in rows], dtype=object)
        frame = frame.reindex(columns=range(len(COLUMNS))).set_axis(list(COLUMNS), axis=1)
        for name in ("seed", "heartbeat", "seconds"):
            frame[name] = pd.to_numeric(frame[name])
        axes = pd.DataFrame([row["axes"] for row in rows], index=frame.index)
        return pd.concat([frame, axes], axis=1)

    def metrics(self) -> pd.DataFrame:
        """Measures in long form: cell, name, value."""
        found = [
            (row["id"], name, value)
            for row in self.rows()
            for name, value in sorted((row.get("metrics") or {}).items())
        ]
        return pd.DataFrame(found, columns=["cell", "name", "value"])

    def curves(self) -> pd.DataFrame:
        """What was logged over training in long form: cell, epoch, name, value."""
        found = [
            (row["id"], epoch, name, value)
            for row in self.rows()
            for epoch, name, value in sorted(row.get("curves") or [], key=lambda p: (p[1], p[0]))
        ]
        return pd.DataFrame(found, columns=["cell", "epoch", "name", "value"])

    def export(self) -> None:
        """Write the finished rows as one CSV; of several writers the last one's is whole."""
        with replacing(self.csv) as part, part.open("w", newline="") as file:
            file.write(f"{_COMMENT}{json.dumps(self.meta())}\n")
            out = csv.writer(file)
            out.writerow(_CSV)
            for row in self.rows():
                if row["status"] == "done":
                    out.writerows(_lines(row))


def _read_row(path: Path) -> dict[str, Any]:
    """A row, or one line that says how it is had again."""
    try:
        row = read_summed(path)
    except IECLError as error:
        raise IECLError(
            f"{error}; delete it, and the same benchmark makes it again of its run"
        ) from None
    if missing := sorted({*_IDENTITY, "status"} - row.keys()):
        raise IECLError(f"{path}: it is no row of a benchmark ({missing[0]} is missing)")
    return _checked_row(str(path), row)


def _check_id(where: str, cell: str) -> None:
    """An id names a file of the store, and none elsewhere."""
    if not cell or Path(cell).name != cell or "\0" in cell or f"{cell}.json" == _META:
        raise IECLError(f"{where}: id {cell!r} is not allowed, a file's name is")


def _checked_row(where: str, row: dict[str, Any]) -> dict[str, Any]:
    _check_id(where, str(row["id"]))
    for name in ("axes", "metrics", "versions"):
        if not isinstance(row.get(name) or {}, Mapping):
            raise IECLError(f"{where}: {name}: {row[name]!r} is not a block of keys")
    return row


#: What ``begin`` records and a report goes through, by kind.
_META_KINDS: tuple[tuple[tuple[str, ...], type, str], ...] = (
    (("name", "preset", "question", "kind", "command"), str, "a text"),
    (("arms", "axes", "data", "settings", "evaluation"), dict, "a block of keys"),
    (("cells", "measures", "seeds", "published"), list, "a list"),
)


def _checked_meta(where: str, meta: Any) -> dict[str, Any]:
    def check(name: str, value: Any, kind: type, words: str) -> None:
        if value is not None and not isinstance(value, kind):
            raise IECLError(f"{where}: {name}: {value!r} is not {words}")

    if not isinstance(meta, dict):
        raise IECLError(f"{where}: {meta!r} is not what a benchmark was, a block of keys")
    for names, kind, words in _META_KINDS:
        for name in names:
            check(name, meta.get(name), kind, words)
    for name in ("cells", "measures"):
        for value in meta.get(name) or []:
            check(name, value, str, "a text")
    for axis, values in (meta.get("axes") or {}).items():
        check(f"axes.{axis}", values, list, "a list")
    for arm, block in (meta.get("arms") or {}).items():
        check(f"arms.{arm}", block, dict, "a block of keys")
    for entry in meta.get("published") or []:
        check("published", entry, dict, "a block of keys")
        check("published: axes", entry.get("axes"), dict, "a block of keys")
        if not isinstance(entry.get("value"), int | float):
            raise IECLError(f"{where}: published: {entry} has no value that is a number")
    return meta


def _lines(row: Mapping[str, Any]) -> Iterable[list[Any]]:
    same = [row[name] for name in _IDENTITY]
    same[_IDENTITY.index("axes")] = json.dumps(row["axes"], sort_keys=True)
    same += [row.get("device"), row.get("seconds")]
    versions = json.dumps(row.get("versions") or {})
    for name, value in sorted(row["metrics"].items()):
        number = "" if value is None or math.isnan(value) else repr(float(value))
        yield [*same, name, number, versions]
        versions = ""


def read_rows(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a benchmark was, and its finished rows, of a ``rows.csv``.

    Args:
        path: the file, as ``Store.export`` wrote it.

    Returns:
        What ``Store.meta`` gave, and rows as ``Store.put`` takes them; no curves are in them.

    Raises:
        IECLError: one line, for a file that is not there or is no such CSV.
    """
    file = Path(path)
    if not file.is_file():
        raise IECLError(f"rows {path}: no such file")
    try:
        text = file.read_text().splitlines()
        commented = text[:1] and text[0].startswith(_COMMENT)
        meta = json.loads(text.pop(0).removeprefix(_COMMENT)) if commented else {}
        reader = csv.DictReader(text, strict=True)
        if missing := sorted({*_CSV} - set(reader.fieldnames or _CSV)):
            raise IECLError(f"rows {path}: it has no column {missing[0]}; {', '.join(_CSV)} are")
        lines: dict[str, dict[str, str]] = {}
        for line in reader:
            where = f"rows {path}: line {reader.line_num + bool(commented)}"
            if None in line or None in line.values():
                raise IECLError(f"{where} is not whole: it has not a value for each column")
            lines[where] = line
        if not lines and not commented:
            raise IECLError(f"rows {path}: it is empty")
        return _checked_meta(f"rows {path}", meta), _grouped(lines)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        if isinstance(error, IECLError):
            raise
        raise IECLError(f"rows {path}: it is no CSV of a benchmark's rows ({error})") from None


def _grouped(lines: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Rows of lines by where they stand, which an error names."""
    found: dict[str, dict[str, Any]] = {}
    for where, line in lines.items():
        if line["id"] not in found:
            row = {
                **{name: line[name] for name in ("id", "data", "arm", "method")},
                "against": line["against"] or None,
                "axes": json.loads(line["axes"]),
                "seed": int(line["seed"]),
                "device": line["device"] or None,
                "seconds": float(line["seconds"]) if line["seconds"] else None,
                "versions": json.loads(line["versions"]) if line["versions"] else None,
                "metrics": {},
            }
            found[line["id"]] = _checked_row(where, row)
        value = float(line["value"]) if line["value"] else math.nan
        found[line["id"]]["metrics"][line["measure"]] = value
    return list(found.values())
