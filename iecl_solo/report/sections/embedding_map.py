"""A map of each arm's features on a plane, to be looked at."""

from __future__ import annotations

from functools import partial

from iecl_solo.report import figures
from iecl_solo.report.figures import picture
from iecl_solo.report.results import Results
from iecl_solo.report.section import Section

PLACE = 85


def sections(results: Results) -> list[Section]:
    """A scatter plot for each arm, one colour a label where there are few."""
    pictures = []
    for i, arm, seed, gallery in results.galleries:
        labels = len(set(gallery.labels.tolist()) - {-1})
        caption = f"Seed {seed}: {len(gallery.points)} images by {gallery.map_name} of their "
        caption += "normalised features. Distances on a map of two dimensions are approximate."
        if 1 < labels <= figures.LABELS:
            caption += " One colour and mark a label."
        pictures.append(
            picture(
                f"map-{i}-{results.arms.index(arm)}",
                f"{arm}, {results.setting_text(i)}",
                caption,
                partial(figures.scatter, points=gallery.points, labels=gallery.labels),
                height=3.2,
                grid="none",
            )
        )
    return [Section("map", "Map of the features", PLACE, pictures=pictures)]
