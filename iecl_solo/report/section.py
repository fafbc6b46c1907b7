"""A part of the page, and what its kinds share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from iecl_solo.report.figures import Line, Look, Picture
from iecl_solo.report.results import Results, text
from iecl_solo.report.statistics import summarize
from iecl_solo.report.tables import Cell, Table

#: More arms than this make a panel illegible, and a table wider than a page.
MANY = 6


@dataclass(frozen=True)
class Section:
    """A part of the page; what is in ``folded`` opens on demand.

    Attributes:
        id: in the page.
        title: its heading.
        place: sections stand in ascending order of it; equal ones in the order they were found.
        words: paragraphs.
        tables: below them.
        pictures: below those.
        folded: sections that open on demand.
    """

    id: str
    title: str
    place: float = 0
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[Section] = field(default_factory=tuple)

    @property
    def caption(self) -> str:
        """The caption that all of its several figures share; empty if they share none."""
        captions = {figure.caption for figure in self.pictures}
        return captions.pop() if len(captions) == 1 and len(self.pictures) > 1 else ""

    def walk(self) -> Iterator[Section]:
        """It and all that is folded in it."""
        yield self
        for section in self.folded:
            yield from section.walk()


def setting_cells(results: Results, setting: int) -> list[Cell]:
    """What names a row: data set and axes."""
    return [Cell(value) for value in results.settings[setting]]


def expand(results: Results, frame: pd.DataFrame) -> pd.DataFrame:
    """Put a setting's own columns where its index was."""
    columns = pd.DataFrame(
        [results.setting_columns(i) for i in frame["setting"]],
        columns=["data", *results.axes],
        index=frame.index,
    )
    rest = frame.drop(columns=[c for c in ("setting", "order") if c in frame])
    return pd.concat([columns, rest], axis=1)


def seeds_line(
    results: Results, measure: str, label: str, look: Look, at: Iterable[tuple[float, int, str]]
) -> Line:
    """Mean and 95 % interval over seeds at each (x, setting, arm) that has been measured."""
    points = [(x, summarize(results.values(measure, i, arm))) for x, i, arm in at]
    points = [(x, summary) for x, summary in points if summary.n]
    columns = zip(*((x, s.mean, s.low, s.high) for x, s in points), strict=True)
    x, y, low, high = (list(c) for c in columns) if points else ([], [], [], [])
    return Line(label, look, x, y, low, high)


def chunks(results: Results, arms: Sequence[str]) -> list[list[str]]:
    """Arms by panel: few enough to read, each with what it is compared with."""
    compared = [arm for arm in arms if results.against.get(arm) is not None]
    alone = [arm for arm in arms if arm not in compared]
    if len(arms) <= MANY + 1:
        return [list(arms)]
    found, shown = [], set()
    for i in range(0, len(compared), MANY):
        chunk = compared[i : i + MANY]
        bases = {results.against[arm] for arm in chunk}
        found.append([arm for arm in arms if arm in chunk or arm in bases])
        shown |= bases
    rest = [arm for arm in alone if arm not in shown]
    return found + [rest[i : i + MANY] for i in range(0, len(rest), MANY)]


def matches(results: Results, entry: Mapping[str, Any]) -> list[int]:
    """Settings that a published figure is of."""
    wanted = {"data": entry.get("data")} | dict(entry.get("axes") or {})
    return [
        i
        for i in range(len(results.settings))
        if all(results.setting_columns(i).get(k) == text(v) for k, v in wanted.items())
    ]
