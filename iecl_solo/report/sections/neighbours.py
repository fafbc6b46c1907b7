"""The nearest neighbours of a few images, for a baseline and what is compared with it."""

from __future__ import annotations

from functools import partial

from iecl_solo.report import figures
from iecl_solo.report.figures import picture
from iecl_solo.report.results import Results
from iecl_solo.report.section import Section

PLACE = 80


def sections(results: Results) -> list[Section]:
    """A picture for each arm, side by side: the same images in each, their neighbours beside."""
    pictures = []
    for i, arm, seed, gallery in results.galleries:
        labelled = bool((gallery.labels >= 0).any())
        rows, wrong = {}, []
        for n, (query, found) in enumerate(zip(gallery.queries, gallery.neighbours, strict=True)):
            rows[str(n + 1)] = gallery.pictures[[query, *found]]
            wrong += [(n, j + 1) for j, same in enumerate(gallery.same[n]) if not same]
        caption = (
            f"Seed {seed}: an image, and to its right those whose features have the largest cosine "
            "with its own, nearest first; the same images for every arm."
        )
        if labelled:
            right = int(gallery.same.sum())
            caption += f" Framed: another label ({right} of {gallery.same.size} have the image's)."
        pictures.append(
            picture(
                f"neighbours-{i}-{results.arms.index(arm)}",
                f"{arm}, {results.setting_text(i)}",
                caption,
                partial(figures.mosaic, rows=rows, framed=wrong, first_apart=True),
                height=0.2 + 0.6 * len(rows),
                grid="none",
            )
        )
    return [Section("neighbours", "Nearest neighbours", PLACE, pictures=pictures)]
