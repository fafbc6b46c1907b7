"""Views before and after what an objective does to them (IE-CL's figure 2)."""

from __future__ import annotations

from functools import partial

from iecl_solo.report import figures
from iecl_solo.report.figures import picture
from iecl_solo.report.results import Results
from iecl_solo.report.section import Section

PLACE = 70


def sections(results: Results) -> list[Section]:
    """A picture for each arm whose objective transforms the views: view, changed, difference."""
    pictures = []
    for i, arm, seed, gallery in results.galleries:
        if not len(gallery.before):
            continue
        difference = abs(gallery.after.astype(float) - gallery.before.astype(float))
        largest = difference.max() or 1.0
        percent = 100 * difference.max() / 255
        rows = {
            "view": gallery.before,
            "changed": gallery.after,
            "difference": (255 * difference / largest).astype("uint8"),
        }
        pictures.append(
            picture(
                f"views-{i}-{results.arms.index(arm)}",
                f"{arm}, {results.setting_text(i)}",
                f"Seed {seed}: views of the last epoch, what the learned transform makes of them "
                "(shown at the view's own mean and contrast), and their difference, at most "
                f"{percent:.{0 if percent >= 1 else 1}f} % of the scale, stretched to all of it.",
                partial(figures.mosaic, rows=rows),
                height=0.4 + 0.62 * len(rows),
                grid="none",
            )
        )
    return [Section("views", "Views before and after", PLACE, pictures=pictures)]
