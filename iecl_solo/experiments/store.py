"""One SQLite file that holds a benchmark: its cells, their measures and their curves."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from iecl_solo.errors import IECLError

STORE = "store.sqlite"

#: Seconds without a sign of life after which a cell that runs on another machine is taken over.
STALE = 600.0

# The rollback journal, not the write-ahead log: the latter needs memory that all writers share,
# which machines on one network folder do not have.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    id TEXT PRIMARY KEY,
    data TEXT NOT NULL, arm TEXT NOT NULL, against TEXT, method TEXT NOT NULL,
    axes TEXT NOT NULL, seed INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('running', 'done', 'failed')),
    error TEXT, owner TEXT, heartbeat REAL, seconds REAL, device TEXT,
    config TEXT, versions TEXT, command TEXT
);
CREATE TABLE IF NOT EXISTS metrics (
    cell TEXT NOT NULL REFERENCES cells (id), name TEXT NOT NULL, value REAL,
    PRIMARY KEY (cell, name)
);
CREATE TABLE IF NOT EXISTS curves (
    cell TEXT NOT NULL REFERENCES cells (id), epoch INTEGER NOT NULL, name TEXT NOT NULL,
    value REAL, PRIMARY KEY (cell, epoch, name)
);
CREATE VIEW IF NOT EXISTS runs AS
    SELECT c.data, c.arm, c.axes, c.seed, c.status, m.name AS measure, m.value
    FROM cells c LEFT JOIN metrics m ON m.cell = c.id
    ORDER BY c.data, c.axes, c.arm, c.seed, m.name;
"""


def owner() -> str:
    """Who is writing: the machine and the process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _alive(name: str, heartbeat: float) -> bool:
    machine, _, pid = name.rpartition(":")
    if machine != socket.gethostname():
        return time.time() - heartbeat < STALE
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Store:
    """A benchmark's rows; several processes may write to one file at once.

    A cell is one run of the grid. It is claimed before it is run, so that no two workers run it,
    and its row appears whole in one transaction when it is done. A claim whose process is gone
    counts for nothing, so that after a crash or a kill the cell is simply run again.

    Args:
        path: the file; made if it is not there.
        create: whether it may be made.

    Raises:
        IECLError: one line, if the file is not there or is not such a store.

    Example:
        >>> import tempfile
        >>> store = Store(Path(tempfile.mkdtemp()) / "store.sqlite")
        >>> store.claim({"id": "a", "data": "digits", "arm": "simclr", "method": "simclr",
        ...              "against": None, "axes": {"optimizer.batch_size": 128}, "seed": 0})
        True
        >>> store.finish("a", {"knn_acc1": 95.0}, [(0, "loss", 5.1)], seconds=3.0)
        >>> store.cells()[["arm", "optimizer.batch_size", "seed", "status"]].values.tolist()
        [['simclr', 128, 0, 'done']]
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise IECLError(f"store {path}: no such file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._connect(write=create) as db:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone():
                    if not create or db.execute("SELECT 1 FROM sqlite_master").fetchone():
                        raise IECLError(f"store {path}: a database, but not a benchmark's")
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
        except sqlite3.DatabaseError as error:
            raise IECLError(f"store {path}: {error}") from None

    @contextmanager
    def _connect(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        # one connection a transaction: none is held over a fork or a training. A reader asks for no
        # lock that a writer, or a file that may not be written, would refuse
        db = sqlite3.connect(self.path, timeout=120, isolation_level=None)
        try:
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield db
            db.execute("COMMIT")
        finally:
            db.close()  # rolls back what was not committed

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
        rows = [(key, json.dumps(value)) for key, value in meta.items()]
        with self._connect() as db:
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def claim(self, cell: Mapping[str, Any]) -> bool:
        """Make a cell this process's, unless it is done or a living process has it.

        Args:
            cell: id, data, arm, against (an arm or None), method, axes (a mapping), seed.
        """
        with self._connect() as db:
            row = db.execute(
                "SELECT status, owner, heartbeat FROM cells WHERE id = ?", (cell["id"],)
            ).fetchone()
            if row is not None:
                status, name, heartbeat = row
                if status == "done" or (
                    status == "running" and name != owner() and _alive(name, heartbeat)
                ):
                    return False
            db.execute(
                "INSERT OR REPLACE INTO cells "
                "(id, data, arm, against, method, axes, seed, status, owner, heartbeat) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'running', ?, ?)",
                (
                    *(cell[name] for name in ("id", "data", "arm", "against", "method")),
                    json.dumps(cell["axes"], sort_keys=True),
                    cell["seed"],
                    owner(),
                    time.time(),
                ),
            )
        return True

    def beat(self, cell: str) -> None:
        """A sign of life, for workers on other machines."""
        with self._connect() as db:
            db.execute("UPDATE cells SET heartbeat = ? WHERE id = ?", (time.time(), cell))

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
            columns: seconds, device, command; config and versions as mappings.
        """
        values = {k: json.dumps(v) if isinstance(v, Mapping) else v for k, v in columns.items()} | {
            "status": "done",
            "error": None,
        }
        with self._connect() as db:
            for table in ("metrics", "curves"):
                db.execute(f"DELETE FROM {table} WHERE cell = ?", (cell,))
            db.executemany(
                "INSERT INTO metrics VALUES (?, ?, ?)",
                [(cell, name, value) for name, value in metrics.items()],
            )
            db.executemany(
                "INSERT INTO curves VALUES (?, ?, ?, ?)",
                [(cell, epoch, name, value) for epoch, name, value in curves],
            )
            assigned = ", ".join(f"{name} = ?" for name in values)
            db.execute(f"UPDATE cells SET {assigned} WHERE id = ?", (*values.values(), cell))

    def fail(self, cell: str, error: str) -> None:
        """Record why a cell could not be run; a rerun tries it again."""
        with self._connect() as db:
            db.execute("UPDATE cells SET status = 'failed', error = ? WHERE id = ?", (error, cell))

    def meta(self) -> dict[str, Any]:
        """What ``begin`` recorded."""
        with self._connect(write=False) as db:
            return {k: json.loads(v) for k, v in db.execute("SELECT key, value FROM meta")}

    def done(self) -> set[str]:
        """Ids of the finished cells."""
        with self._connect(write=False) as db:
            return {i for (i,) in db.execute("SELECT id FROM cells WHERE status = 'done'")}

    def cells(self) -> pd.DataFrame:
        """One row a cell; each axis of the grid is a column of its own, by its dotted key."""
        with self._connect(write=False) as db:
            frame = pd.read_sql("SELECT * FROM cells ORDER BY id", db)
        for column in ("config", "versions"):
            frame[column] = [json.loads(v) if isinstance(v, str) else None for v in frame[column]]
        axes = pd.DataFrame([json.loads(v) for v in frame.pop("axes")], index=frame.index)
        return pd.concat([frame, axes], axis=1)

    def metrics(self) -> pd.DataFrame:
        """Measures in long form: cell, name, value."""
        with self._connect(write=False) as db:
            return pd.read_sql("SELECT * FROM metrics ORDER BY cell, name", db)

    def curves(self) -> pd.DataFrame:
        """What was logged over training in long form: cell, epoch, name, value."""
        with self._connect(write=False) as db:
            return pd.read_sql("SELECT * FROM curves ORDER BY cell, name, epoch", db)
