"""Tables of a report: one table, four forms (HTML and Markdown by template, LaTeX, CSV)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from iecl_solo.evaluate.label_free import BETTER
from iecl_solo.report.statistics import Summary
from iecl_solo.solo.registry import term_label

#: What measures are called, and their units; a term of an objective is called as the objective
#: says, and any other measure by its own name.
NAMES = {
    "online_acc1": ("online linear top-1", "%"),
    "knn_acc1": ("k-NN top-1", "%"),
    "knn_acc5": ("k-NN top-5", "%"),
    "linear_acc1": ("linear probe top-1", "%"),
    "linear_acc5": ("linear probe top-5", "%"),
    "finetune_1_acc1": ("fine-tuning on 1 % of labels, top-1", "%"),
    "finetune_10_acc1": ("fine-tuning on 10 % of labels, top-1", "%"),
    "val_acc1": ("evaluation top-1", "%"),
    "train_acc1": ("training top-1", "%"),
    "query_entropy": ("H(Z′) of the query", "nats"),
    "entropy_query": ("coding rate of the query", "nats"),
    "entropy_anchor": ("coding rate of the anchor", "nats"),
    "effective_rank": ("effective rank", ""),
    "delta_h": ("ΔH of SAIB", "nats per dimension"),
    "delta_h_isotropic": ("ΔH from scaling", "nats per dimension"),
    "delta_h_anisotropic": ("ΔH beyond scaling", "nats per dimension"),
    "dense_miou": ("dense, mIoU of a linear head", "%"),
    "rankme": ("RankMe, effective rank of the features", ""),
    "lidar": ("LiDAR, effective rank between images", ""),
    "alpha_req": ("alpha-ReQ, decay of the spectrum (best near 1)", ""),
    "uniformity": ("uniformity of the features (lower is better)", "nats"),
    "alignment": ("alignment of an image's views (lower is better)", ""),
    "host_loss": ("the host's own loss", ""),
    "delta_h_contrast": ("ΔH from contrast", "nats per dimension"),
    "delta_h_beyond_contrast": ("ΔH beyond contrast", "nats per dimension"),
    "conditional_entropy": ("H(X′ | X) of SAIB", "nats per noise dimension"),
    "budget": ("SAIB's mean step", "deviations"),
    "patch_kl": ("KL of the views' patches", "nats per dimension"),
    "seconds_per_step": ("time of a step", "s"),
    "parameters": ("parameters", ""),
    "peak_memory_bytes": ("peak memory of a training", "MiB"),
    "peak_tensor_bytes": ("peak memory of a step's tensors", "MiB"),
    "flops": ("computation of a step", "GFLOP"),
    "images_per_second": ("views alone", "images/s"),
    "ratio_to_host": ("views alone, × solo-learn", ""),
    "training_images_per_second": ("training", "images/s"),
    "training_ratio_to_host": ("training, × solo-learn", ""),
    "startup_seconds": ("a command of one step", "s"),
    "resident_bytes": ("peak resident memory", "bytes"),
    "time_ratio": ("step time, × baseline", ""),
    "memory_ratio": ("peak memory, × baseline", ""),
    "flops_ratio": ("FLOPs, × baseline", ""),
    "parameters_ratio": ("parameters, × baseline", ""),
}

#: Measures of cost, as the cost table has them.
COST = (
    *("time_ratio", "memory_ratio", "flops_ratio", "parameters_ratio"),
    *("seconds_per_step", "peak_memory_bytes", "peak_tensor_bytes", "flops", "parameters"),
)
_QUARTILES = ("time_ratio_low", "time_ratio_high")


def is_cost(measure: str) -> bool:
    """Whether the cost table shows it."""
    return measure in COST or measure in _QUARTILES


def _known(measure: str) -> tuple[str, str] | None:
    """Name and unit: of the list above, or as its objective calls its term."""
    if recall := re.fullmatch(r"(same_object_)?recall_at_(\d+)", measure):
        of = "of the same object, " if recall[1] else ""
        return f"retrieval {of}recall@{recall[2]}", "%"
    return NAMES.get(measure) or term_label(measure)


def name(measure: str) -> str:
    """What a measure is called in prose.

    Example:
        >>> name("knn_acc1"), name("knn_acc1/stl10"), name("mine")
        ('k-NN top-1', 'k-NN top-1 on stl10', 'mine')
    """
    base, _, other = measure.partition("/")
    known = _known(base)
    if known is None:
        return measure
    return f"{known[0]} on {other}" if other else known[0]


def unit(measure: str) -> str:
    """The unit of a measure, empty for those without or unknown."""
    return (_known(measure.partition("/")[0]) or ("", ""))[1]


def difference_unit(measure: str) -> str:
    """The unit of a difference: of percentages it is points."""
    return "points" if unit(measure) == "%" else unit(measure)


def title(measure: str) -> str:
    """Its name and unit, as axes and headings have them.

    Example:
        >>> title("knn_acc1"), title("uniformity"), title("mine")
        ('k-NN top-1 (%)', 'uniformity of the features (lower is better; nats)', 'mine')
    """
    words, of = name(measure), unit(measure)
    if of and " (" in words:
        return f"{words[:-1]}; {of})"
    return f"{words} ({of})" if of else words


def heading(words: str) -> str:
    """Words with a capital in front, but for names that have none.

    Example:
        >>> heading("linear probe top-1"), heading("k-NN top-1"), heading("my_measure")
        ('Linear probe top-1', 'k-NN top-1', 'my_measure')
    """
    first = words.partition(" ")[0]
    return words if first == "k-NN" or "_" in first else words[:1].upper() + words[1:]


def better(measure: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither can be said."""
    if re.search(r"_acc\d|recall_at_|_miou", measure):
        return 1
    return -1 if is_cost(measure) else BETTER.get(measure, 0)


def shown(measure: str, value: float) -> float:
    """The value in the unit that it is shown in."""
    units = {"peak_memory_bytes": 2**20, "peak_tensor_bytes": 2**20, "flops": 1e9}
    return value / units.get(measure, 1)


def number(measure: str, value: float, spread: float = math.nan, sign: bool = False) -> str:
    """A value of a measure: percentages with two decimals, others as their spread allows.

    Args:
        measure: its name.
        value: as stored.
        spread: a standard deviation; two of its digits are kept.
        sign: whether to show a plus.

    Example:
        >>> number("knn_acc1", 90.123), number("mine", -0.01234, spread=0.0021)
        ('90.12', '−0.0123')
        >>> number("parameters", 15380554), number("knn_acc1", 1.5, sign=True)
        ('15,380,554', '+1.50')
        >>> number("knn_acc1", -0.001, sign=True)
        '0.00'
    """
    if not math.isfinite(value):
        return "–"
    value, spread = shown(measure, value), shown(measure, spread)
    if unit(measure) == "%" or measure.endswith("_ratio"):
        form = ".3f" if measure.endswith("_ratio") else ".2f"
    elif abs(value) >= 1e4:
        form = ",.0f" if abs(value) < 1e9 else ".3g"
    elif math.isfinite(spread) and spread > 0:
        form = f".{min(max(1 - math.floor(math.log10(spread)), 0), 8)}f"
    else:
        form = ".4g"
    words = f"{value:{'+' if sign else ''}{form}}"
    if not words.strip("+-0."):  # rounded to nothing, which has no sign
        words = words.lstrip("+-")
    return words.replace("-", "−")


def p_value(p: float) -> str:
    """A p-value with three decimals.

    Example:
        >>> p_value(0.0421), p_value(1e-9), p_value(float("nan"))
        ('0.042', '<0.001', '–')
    """
    if not math.isfinite(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def plus_minus(measure: str, summary: Summary, seeds: int) -> str:
    """Mean ± standard deviation, with n where it is not the table's.

    Example:
        >>> plus_minus("knn_acc1", Summary(3, 90.1, 0.25, 89.5, 90.7), seeds=3)
        '90.10 ± 0.25'
        >>> plus_minus("knn_acc1", Summary(1, 90.1, float("nan"), 0, 0), seeds=3)
        '90.10 (n = 1)'
    """
    text = number(measure, summary.mean, summary.sd)
    if math.isfinite(summary.sd):
        text += f" ± {number(measure, summary.sd, summary.sd)}"
    return text if summary.n == seeds else f"{text} (n = {summary.n})"


def interval(measure: str, summary: Summary, sign: bool = False) -> str:
    """The 95 % interval, or a dash.

    Example:
        >>> interval("knn_acc1", Summary(3, 1.0, 0.5, -0.24, 2.24), sign=True)
        '−0.24 to +2.24'
    """
    if not math.isfinite(summary.low):
        return "–"
    ends = (number(measure, end, summary.sd, sign) for end in (summary.low, summary.high))
    return " to ".join(ends)


@dataclass(frozen=True)
class Cell:
    """An entry of a table: its text, whether it is the best, and a mark behind it."""

    text: str
    bold: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table as it is read, and the numbers in it as they are.

    Attributes:
        name: of its files.
        title: its heading.
        caption: what it shows, and what its marks mean.
        head: the columns' headings.
        rows: entries; all rows have as many as there are headings.
        align: a letter for each column: h (to the left, names the row), l or r.
        data: the numbers in full precision, for the CSV.
    """

    name: str
    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str
    data: pd.DataFrame

    @property
    def labels(self) -> int:
        """How many columns name the row."""
        return self.align.count("h")

    @property
    def lead(self) -> str:
        """The heading, as it stands before the caption."""
        return self.title if self.title.endswith("?") else f"{self.title}."

    @property
    def marked(self) -> bool:
        """Whether any entry has a mark, for which all must leave room."""
        return any(cell.mark for row in self.rows for cell in row)


_LATEX: dict[str | int, str | int | None] = {
    **{c: "\\" + c for c in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
    **{"<": "$<$", ">": "$>$", "|": r"\textbar{}", '"': "''", "\n": " "},
    **{
        "±": r"$\pm$",
        "−": "$-$",
        "×": r"$\times$",
        "†": r"$\dagger$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
    },
    **{"–": "--", "′": "$'$", "°": r"$^\circ$", "·": r"$\cdot$", "’": "'", "…": r"\dots{}"},
    **{"Δ": r"$\Delta$", "β": r"$\beta$", "λ": r"$\lambda$", "η": r"$\eta$", "τ": r"$\tau$"},
}


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it.

    Example:
        >>> print(escape_latex("iecl_simclr: 50 % ± 1"))
        iecl\\_simclr: 50 \\% $\\pm$ 1
    """
    return text.translate(str.maketrans(_LATEX))


def latex(table: Table) -> str:
    """The table as LaTeX; the document needs ``\\usepackage{booktabs}``.

    Example:
        >>> table = Table("t", "T", "Of x.", ["arm", "k-NN (%)"],
        ...               [[Cell("a_b"), Cell("91 ± 1", True, "†")]], "hr", pd.DataFrame())
        >>> print(latex(table))
        \\begin{table}[t]
        \\centering
        \\caption{T. Of x.}
        \\label{tab:t}
        \\begin{tabular}{lr}
        \\toprule
        arm & k-NN (\\%) \\\\
        \\midrule
        a\\_b & \\textbf{91 $\\pm$ 1}$^{\\dagger}$ \\\\
        \\bottomrule
        \\end{tabular}
        \\end{table}
        <BLANKLINE>
    """

    def entry(cell: Cell) -> str:
        text = escape_latex(cell.text)
        text = rf"\textbf{{{text}}}" if cell.bold else text
        mark = escape_latex(cell.mark)
        mark = mark.strip("$") if mark.startswith("$") else rf"\mathrm{{{mark}}}"
        return rf"{text}$^{{{mark}}}$" if cell.mark else text

    frame = pd.DataFrame([[entry(cell) for cell in row] for row in table.rows])
    frame = frame.reindex(columns=range(len(table.head)))  # by number: headings may repeat
    heads: dict[Any, str] = dict(enumerate(map(escape_latex, table.head)))
    style = frame.style.hide(axis="index").format_index(lambda i: heads[i], axis="columns")
    return style.to_latex(
        column_format=table.align.replace("h", "l"),
        position="t",
        position_float="centering",
        hrules=True,
        caption=escape_latex(f"{table.lead} {table.caption}"),
        label=f"tab:{table.name}",
    )


def escape_markdown(text: str) -> str:
    """Text as Markdown prints it, also within a table.

    Example:
        >>> escape_markdown("a|b *c* <d>")
        'a\\\\|b \\\\*c\\\\* &lt;d>'
    """
    text = re.sub(r"([\\|*`\[\]])", r"\\\1", text).replace("<", "&lt;")
    return " ".join(text.split())
