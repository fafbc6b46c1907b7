"""ΔH of the learned transform against the host's loss over training (IE-CL's figure 5)."""

from __future__ import annotations

from functools import partial

from iecl_solo.report import figures
from iecl_solo.report.figures import Line, picture
from iecl_solo.report.results import Results
from iecl_solo.report.section import Section, chunks
from iecl_solo.report.sections.curves import over_seeds, thin
from iecl_solo.report.tables import title

PLACE = 60


def sections(results: Results) -> list[Section]:
    """A path for each arm whose transform's ΔH was measured."""
    pictures = []
    for i in range(len(results.settings)):
        for j, arms in enumerate(chunks(results, results.arms)):
            lines = []
            for arm in arms:
                both = over_seeds(results, "delta_h", i, arm)[["mean"]].join(
                    over_seeds(results, "host_loss", i, arm)["mean"].rename("loss"), how="inner"
                )
                both = thin(both)
                if len(both) > 1:
                    x, y = both["mean"].to_numpy(), both["loss"].to_numpy()
                    lines.append(Line(arm, results.looks[arm], x, y, y, y))
            if lines:
                pictures.append(
                    picture(
                        f"delta-h-{i}-{j}",
                        f"ΔH against the host's loss, {results.setting_text(i)}",
                        "Means over seeds, epoch by epoch: from the hollow point to the filled "
                        "one. ΔH is E log|det J| of SAIB in nats per dimension, scaling included.",
                        partial(
                            figures.paths, lines=lines, x=title("delta_h"), y=title("host_loss")
                        ),
                    )
                )
    return [Section("delta-h", "ΔH against the loss", PLACE, pictures=pictures)]
