"""Training curves (IE-CL's figure 4): accuracy and loss first, all others folded."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd

from iecl_solo.report import figures
from iecl_solo.report.figures import Line, Picture, picture
from iecl_solo.report.results import Results, slug
from iecl_solo.report.section import Section, chunks
from iecl_solo.report.tables import heading, name, title

PLACE = 50

#: More settings than this are folded, where each has its own curves.
_OPEN = 3

#: More points than this make a line no clearer.
_POINTS = 200


def thin(frame: pd.DataFrame) -> pd.DataFrame:
    """No more rows than a line needs, the last one among them."""
    step = math.ceil(len(frame) / _POINTS)
    return frame.iloc[sorted({*range(0, len(frame), step), len(frame) - 1})] if step > 1 else frame


def over_seeds(results: Results, measure: str, setting: int, arm: str) -> pd.DataFrame:
    """Mean and standard deviation over seeds at each epoch, counted from 1 as logs print them."""
    curves = results.curves
    own = curves[
        (curves["setting"] == setting) & (curves["arm"] == arm) & (curves["name"] == measure)
    ]
    own = own[np.isfinite(own["value"])]
    found = own.groupby("epoch")["value"].agg(["mean", "std"])
    return found.set_index(found.index + 1)


def _curve_pictures(results: Results, measure: str, setting: int) -> list[Picture]:
    found = []
    for j, arms in enumerate(chunks(results, results.arms)):
        lines = []
        for arm in arms:
            frame = thin(over_seeds(results, measure, setting, arm))
            if len(frame):
                mean, sd = frame["mean"].to_numpy(), frame["std"].fillna(0.0).to_numpy()
                epochs = frame.index.to_numpy(dtype=float)
                lines.append(Line(arm, results.looks[arm], epochs, mean, mean - sd, mean + sd))
        if not lines:
            continue
        found.append(
            picture(
                f"curve-{slug(measure)}-{setting}-{j}",
                heading(f"{name(measure)}, {results.setting_text(setting)}"),
                "One seed."
                if results.seeds == 1
                else "Mean over seeds; the band is one standard deviation to each side.",
                partial(figures.bands, lines=lines, x="epoch", y=title(measure)),
                grid="y",
            )
        )
    return found


def sections(results: Results) -> list[Section]:
    """Accuracy and loss open, all other curves folded by setting."""
    there = list(dict.fromkeys(results.curves["name"]))
    first = [c for c in ("val_acc1", "host_loss") if c in there] or there[:1]
    rest = [c for c in there if c not in first]
    settings = [i for i in range(len(results.settings)) if i in set(results.curves["setting"])]
    pictures = [p for i in settings[:_OPEN] for c in first for p in _curve_pictures(results, c, i)]
    if not pictures:
        return []
    folded = []
    for n, i in enumerate(settings):
        names, what = (rest, "Other curves") if n < _OPEN else (there, "Curves")
        drawn = [p for c in names for p in _curve_pictures(results, c, i)]
        if drawn:
            where = results.setting_text(i)
            folded.append(Section(f"curves-{i}", f"{what}, {where}", pictures=drawn))
    return [Section("curves", "Over training", PLACE, pictures=pictures, folded=folded)]
