"""``iecl-solo benchmark``: a grid of runs on Hydra's launchers, one folder of rows, one report."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from iecl_solo import checks
from iecl_solo.cli import hydra_app
from iecl_solo.errors import IECLError, last_line, unknown_name
from iecl_solo.evaluate.corruptions import CORRUPTIONS
from iecl_solo.evaluate.label_free import BETTER
from iecl_solo.evaluate.protocol import MEASURES, EvaluationConfig
from iecl_solo.evaluate.run import check_evaluation
from iecl_solo.experiments.cell import find_cell, recover, run_cell
from iecl_solo.experiments.grid import (
    BenchmarkConfig,
    Cell,
    cells,
    configuration,
    read_benchmark,
    write_data,
)
from iecl_solo.experiments.store import STORE, Store, read_rows
from iecl_solo.experiments.throughput import TABLE, write_table
from iecl_solo.quiet import quiet
from iecl_solo.report.answer import answer
from iecl_solo.report.page import write_report
from iecl_solo.report.results import Results, read
from iecl_solo.report.sections.overview import overview_table
from iecl_solo.report.statistics import Summary, summary_table
from iecl_solo.report.tables import NAMES, plus_minus, title
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.host import find_host
from iecl_solo.solo.settings import require, settle_labels
from iecl_solo.train.callbacks.entropy_monitor import MONITORED
from iecl_solo.train.callbacks.terminal import tell
from iecl_solo.train.complete import complete
from iecl_solo.train.processes import launched

#: What has a measure of ``evaluation.measures`` on.
_ADDED = {name: f"{name} in evaluation.measures" for name in MEASURES}
#: What each kind measures whatever it is asked.
_MEASURED = {
    "training": (
        *("knn_acc1", "knn_acc5", "knn_k", "online_acc1", "query_entropy"),
        *("peak_memory_bytes", "trained_parameters"),
    ),
    "cost": (
        *("time_ratio", "time_ratio_low", "time_ratio_high", "memory_ratio", "flops_ratio"),
        *("parameters_ratio", "peak_tensor_bytes", "flops"),
    ),
    "throughput": (
        *("images_per_second", "ratio_to_host", "startup_seconds", "resident_bytes"),
        *("training_images_per_second", "training_ratio_to_host"),
    ),
}
#: How the measures begin that other data sets have too.
_OF_OTHERS = ("knn_", "linear_", "finetune_", "recall_", "same_object_")


def _sources(
    kind: str, evaluation: EvaluationConfig, unlabelled: bool, monitored: bool
) -> list[tuple[Sequence[str], bool, str]]:
    """All measures by what measures them: their names, whether it is on, and what has it on."""
    training, asked = kind == "training", evaluation.measures
    ks, shares = evaluation.retrieval.k, evaluation.finetune.fractions
    found = "retrieval" in asked
    return [
        (_MEASURED["cost"], kind == "cost", "kind: cost"),
        (_MEASURED["throughput"], kind == "throughput", "kind: throughput"),
        (_MEASURED["training"], training, "kind: training"),
        (("parameters", "seconds_per_step"), kind != "throughput", "kind: training, or cost,"),
        (MONITORED, training and monitored, "monitor.every_n_epochs above 0"),
        (list(BETTER), training and ("label_free" in asked or unlabelled), _ADDED["label_free"]),
        (["dense_miou"], training and "dense_miou" in asked, _ADDED["dense_miou"]),
        (
            ("linear_acc1", "linear_acc5", "linear_lr"),
            training and evaluation.linear.max_epochs > 0,
            "evaluation.linear.max_epochs above 0",
        ),
        ([f"finetune_{100 * share:g}_acc1" for share in shares], training, "kind: training"),
        (
            [name for name in NAMES if name.startswith("finetune_")],
            False,
            "evaluation.finetune.fractions",
        ),
        ([f"recall_at_{k}" for k in ks], training and found, _ADDED["retrieval"]),
        (
            [f"same_object_recall_at_{k}" for k in ks],
            training and found and evaluation.retrieval.pattern is not None,
            f"{_ADDED['retrieval']} with evaluation.retrieval.pattern",
        ),
    ]


def _check_measures(
    benchmark: BenchmarkConfig,
    evaluation: EvaluationConfig,
    unlabelled: bool = True,
    monitored: bool = True,
) -> None:
    """Refuse a measure that nothing measures, before all is trained for it.

    Args:
        benchmark: of it ``kind`` and ``measures`` count.
        evaluation: what is measured of each run.
        unlabelled: whether there are runs without labels.
        monitored: whether there are runs whose monitor is on. Where it is off its measures are
            left out of the tables, but for the first one, which the answer is about.
    """
    others = list(evaluation.datasets)
    corrupted = []
    if "corruptions" in evaluation.measures:
        applied = evaluation.corruptions.corruptions or CORRUPTIONS
        corrupted = ["corrupted", *(f"corrupted: {corruption}" for corruption in applied)]
    for place, measure in enumerate(benchmark.measures):
        name, _, data = measure.partition("/")
        on = monitored or place > 0
        sources = _sources(benchmark.kind, evaluation, unlabelled, on)
        known = [measured for names, there, _ in sources if there for measured in names]
        if name not in known:
            by = [what for names, _, what in sources if name in names]
            if by:
                raise IECLError(f"measures: {measure} is not measured here; {by[0]} measures it")
            raise IECLError(f"measures: {unknown_name('measure', name, known)}")
        if data and data not in (*others, *corrupted):
            error = unknown_name("data set", data, [*others, *corrupted])
            raise IECLError(f"measures: {measure}: {error}")
        of_others = ("knn_acc1", "linear_acc1") if data in corrupted else _OF_OTHERS
        if data and not name.startswith(of_others):
            raise IECLError(f"measures: {measure}: it is not measured on other data")


def _tell_unknown_arms(benchmark: BenchmarkConfig) -> None:
    """Published figures of no arm: said, not refused, since ~arms.NAME leaves an arm out."""
    of_ours = (entry for entry in benchmark.published if entry["data"] in benchmark.data)
    for arm in dict.fromkeys(str(entry["arm"]) for entry in of_ours):
        if arm not in benchmark.arms:
            error = unknown_name("arm", arm, benchmark.arms)
            print(f"published: {error}; its figures have none beside them", file=sys.stderr)


def check(benchmark: BenchmarkConfig) -> None:
    """Refuse in one line what would make every cell of an arm fail, before any is run."""
    evaluation: EvaluationConfig = parse_block("evaluation", EvaluationConfig, benchmark.evaluation)
    _tell_unknown_arms(benchmark)
    _check_measures(benchmark, evaluation)
    write_data(benchmark)
    check_evaluation(evaluation)
    host = find_host()
    seen = set()
    unlabelled = monitored = False
    for cell in cells(benchmark):
        key = (cell.arm, cell.data, repr(cell.axes))
        if key not in seen:
            seen.add(key)
            cfg = configuration(benchmark, cell)
            settle_labels(cfg)
            if benchmark.kind == "training" and not cfg.data.get("no_labels"):
                require(cfg, ["data.val_path"])  # of the images that judge
            cfg = complete(cfg, host)
            unlabelled = unlabelled or bool(cfg.data.no_labels)
            monitored = monitored or cfg.monitor.every_n_epochs > 0
            if (threads := cfg.get("threads")) is not None:
                checks.whole("threads", threads, 1)
    _check_measures(benchmark, evaluation, unlabelled, monitored)


def take_gpu(number: int) -> None:
    """Let this worker see one GPU of the machine's, the ``number``-th in turn.

    Lightning would take the first one in every worker. Nothing is done where CUDA runs already, as
    in a worker's second cell, or where there is one GPU at most.
    """
    count = torch.cuda.device_count()
    if count < 2 or torch.cuda.is_initialized():
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    visible = given.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def run_job(cfg: DictConfig) -> None:
    """What each of Hydra's jobs does: run the cell that it is given."""
    benchmark = read_benchmark(cfg)
    hydra = HydraConfig.get()
    if "joblib" in hydra.launcher._target_.lower():  # the other launchers give each job its own
        take_gpu(hydra.job.num)
    assert benchmark.cell is not None
    with quiet():
        run_cell(benchmark, find_cell(benchmark, benchmark.cell))


def _begin(benchmark: BenchmarkConfig, store: Store, line: str) -> None:
    meta: dict[str, Any] = {
        name: plain(getattr(benchmark, name))
        for name in (
            *("name", "preset", "question", "kind", "measures", "settings", "arms", "axes"),
            *("data", "seeds", "published", "evaluation"),
        )
    }
    # a YAML of one's own need not have presets, and is then not "the paper's"
    meta["preset"] = benchmark.preset if benchmark.presets else None
    meta["command"] = line
    meta["cells"] = [cell.id for cell in cells(benchmark)]
    store.begin(meta, fixed=("name", "preset", "kind"))


def _fill(benchmark: BenchmarkConfig, store: Store) -> None:
    """Take in what is known already: committed rows, and runs whose row is lost."""
    known = store.done()
    if benchmark.rows is not None:
        _, given = read_rows(benchmark.rows)
        ids = {cell.id for cell in cells(benchmark)}
        new = [row for row in given if row["id"] in ids and row["id"] not in known]
        for row in new:
            store.put(row)
        print(f"{benchmark.rows}: {len(new)} of {len(ids)} cells were run elsewhere", flush=True)
    found = recover(benchmark, store)
    if found:
        print(f"{benchmark.name}: {found} rows made again of what the runs left", flush=True)
    # an arm that was run by a command without its baseline did not know of it
    compared = {cell.id: cell.against for cell in cells(benchmark) if cell.against is not None}
    for row in store.rows():
        if row["status"] == "done" and row["against"] != compared.get(row["id"], row["against"]):
            store.put({**row, "against": compared[row["id"]]})


def _waves(benchmark: BenchmarkConfig) -> tuple[list[Cell], list[Cell]]:
    """Cells that need no other, and those that need one of them."""
    grid = cells(benchmark)
    return [c for c in grid if c.source is None], [c for c in grid if c.source is not None]


def _launch(
    benchmark: BenchmarkConfig,
    wanted: Sequence[Cell],
    given: hydra_app.Invocation,
    overrides: Sequence[str],
) -> None:
    folder = Path(str(benchmark.dir)).resolve()
    listed = ",".join(cell.id for cell in wanted)
    try:
        hydra_app.launch(
            given,
            run_job,
            ["--multirun", *(flag for flag in given.flags if flag not in hydra_app.MULTIRUN)],
            [
                *overrides,
                f"++cell={listed}",
                f"++dir={str(folder)!r}",
                f"hydra.sweep.dir={str(folder / 'hydra')!r}",
                "hydra.sweep.subdir=${hydra.job.num}",
            ],
        )
    except IECLError:
        raise
    except Exception as error:  # a cell records its own: this is a launcher's, of a job that died
        if not any(override.startswith("hydra/launcher=") for override in overrides):
            raise
        print(
            f"{benchmark.name}: a job was lost ({last_line(error)}); "
            "type the command again once no job runs",
            file=sys.stderr,
        )


def _show_measures(results: Results) -> None:
    """Mean and 95 % interval of each measure; the differences are on the page.

    Arms across, or down where they are more than the measures: thirteen do not fit side by side.
    """
    table = overview_table(results, results.measures)
    shown = slice(1 + len(results.arms))
    lines = [table.head[shown], *([cell.text for cell in row[shown]] for row in table.rows)]
    console = _console()
    down = len(results.arms) > max(4, len(results.measures))
    # beside each other as they are, or the names of the measures would be what gives way
    widths = [max(map(len, column)) + 3 for column in zip(*lines, strict=True)]
    down = down or sum(widths[1:]) + 24 > console.width
    (first, *others), *rows = zip(*lines, strict=True) if down else lines
    view = Table(title="mean [95 % interval]", title_justify="left")
    view.add_column("" if down else first, no_wrap=down)
    for name in others:
        view.add_column(name, justify="right", no_wrap=not down)
    for row in rows:
        view.add_row(*row)
    _print(view)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100)


def _print(view: Table) -> None:
    _console().print(view)


def show(results: Results) -> None:
    """The benchmark on screen, then the answer.

    With one setting it is one table. With several it is a table for each measure, settings down
    and arms across; or one table, settings and arms down, where more than four arms would not fit.
    """
    settings, measures = results.settings, results.measures[:4]
    if len(settings) == 1 and len(results.measures) > 1:
        _show_measures(results)
        tell(answer(results))
        return
    texts: dict[tuple[str, int, str], str] = {}
    for measure in measures:
        found = summary_table(results.of(measure), ["setting"])
        for setting, arm, *summary in found.itertuples(index=False):
            texts[measure, setting, arm] = plus_minus(measure, Summary(*summary), results.seeds)
    known = sorted({setting for _, setting, _ in texts})

    def table(heading: str, labels: Sequence[str], columns: Sequence[str]) -> Table:
        view = Table(title=heading, title_justify="left")
        for head in results.setting_head:
            view.add_column(head)
        for head in labels:
            view.add_column(head, no_wrap=True)
        for column in columns:
            view.add_column(column, justify="right")
        return view

    if len(results.arms) > 4:
        view = table("mean ± standard deviation", ["arm"], [title(m) for m in measures])
        for setting in known:
            for arm in results.arms:
                entries = [texts.get((m, setting, arm), "–") for m in measures]
                view.add_row(*settings[setting], arm, *entries)
        _print(view)
    else:
        for measure in measures:
            view = table(title(measure), [], results.arms)
            for setting in known:
                entries = [texts.get((measure, setting, arm), "–") for arm in results.arms]
                view.add_row(*settings[setting], *entries)
            _print(view)
    tell(answer(results))


def run(given: hydra_app.Invocation) -> int:
    """Run what is missing of the grid, then report.

    Args:
        given: what was typed.

    Returns:
        0 if every cell is done, 1 if some failed (the report says which, and why) or were lost.

    Raises:
        IECLError: one line for whatever the benchmark's configuration gets wrong.
    """
    if launched():
        raise IECLError(
            "benchmark: start it once, not under torchrun; its cells launch devices=N themselves"
        )
    # any key of a benchmark may be given, whether its YAML has it or not
    own = {f.name for f in fields(BenchmarkConfig)}
    overrides = [f"++{a}" if re.split(r"[.=]", a)[0] in own else a for a in given.overrides]
    benchmark = read_benchmark(hydra_app.without_hydra(hydra_app.composed(given, overrides)))
    if benchmark.cell is not None:
        raise IECLError("cell: only the launchers give it; data, arms, axes and seeds choose cells")
    check(benchmark)
    store = Store(Path(str(benchmark.dir)) / STORE)
    _begin(benchmark, store, given.line)
    _fill(benchmark, store)
    for wave in _waves(benchmark):
        done = store.done()
        wanted = [cell for cell in wave if cell.id not in done]
        if wanted:
            print(f"{benchmark.name}: {len(wanted)} of {len(wave)} cells to run", flush=True)
            _launch(benchmark, wanted, given, overrides)
    store.export()
    if benchmark.kind == "throughput":
        write_table(store, store.path.parent / TABLE)
    page = write_report(store, store.path.parent)
    rows = store.cells()
    failed = rows[(rows["status"] == "failed") & rows["id"].isin(c.id for c in cells(benchmark))]
    for row in failed.itertuples():
        print(f"failed: {row.id}: {str(row.error).strip().splitlines()[-1]}", file=sys.stderr)
    show(read(store))
    print(f"rows: {store.csv}\nreport: {page}")
    return 0 if {cell.id for cell in cells(benchmark)} <= store.done() else 1
