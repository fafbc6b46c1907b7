"""What a person sees of a run: a bar on a terminal, lines in a pipe, the same figures in both."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from iecl_solo.solo.registry import shown_terms

#: Seconds between two lines within long work, where there is no bar; and where there is one.
BETWEEN, OF_BAR = 60.0, 0.5


def duration(seconds: float) -> str:
    """A time as a person says it.

    >>> duration(7.2), duration(75.0), duration(7300.0), duration(200_000.0)
    ('7 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    whole = int(seconds)
    for unit, of_unit, smaller, of_smaller in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= of_unit:
            return f"{whole // of_unit} {unit} {whole % of_unit // of_smaller} {smaller}"
    return f"{whole} s"


def tell(line: str) -> None:
    """Print a line; a terminal gets it broken between words, a pipe or a file whole."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, flush=True)


class EachMinute:
    """A line a minute on long work: how much is done, and how long the rest takes at its pace.

    The pace is counted from the first report on: what an earlier call did is no part of it.

    Args:
        what: the work, as the line begins.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._began = self._line = time.perf_counter()
        self._before: int | None = None  # what was done at ``_began``

    def __call__(self, done: int, total: int) -> None:
        """So many of the work's steps are done; 0 where what came before them took time."""
        now = time.perf_counter()
        new = done - (self._before or 0)
        if now - self._line >= BETWEEN and new > 0 and done < total:
            self._line = now
            left = (now - self._began) / new * (total - done)
            tell(f"{self.what}  {done} of {total}  {duration(left)} left")
        if self._before is None:
            self._began, self._before = now, done

    def over(self, items: Any) -> Iterator[Any]:
        """The items of something that has a length, a step each."""
        for i, item in enumerate(items, 1):
            yield item
            self(i, len(items))


def figures(logged: dict[str, Any], *, labelled: bool, ending: str = "_epoch") -> str:
    """The loss, its terms and the online accuracy, out of what was logged.

    Which of the names are terms is the objectives' affair.

    Args:
        logged: values by name.
        labelled: whether accuracy means anything.
        ending: of the names of an epoch's means, or of a step's values.

    >>> figures({"train_nce_loss_epoch": 2.5, "train_acc1_epoch": 33.0, "val_acc1": 30.0, "x": 1.0},
    ...         labelled=True)
    'nce_loss 2.500  acc1 33.000  val_acc1 30.000'
    """
    losses = [k for k in logged if k.endswith((f"_loss{ending}", f"_sim{ending}"))]
    losses = [k for k in losses if labelled or not k.startswith("train_class")]
    terms = [k.removesuffix("_epoch") + ending for k in shown_terms()]
    accuracy = [f"train_acc1{ending}", *(["val_acc1"] if ending == "_epoch" else [])]
    shown = dict.fromkeys([*losses, *(accuracy if labelled else ()), *terms])
    return "  ".join(
        f"{k.removesuffix(ending).removeprefix('train_')} {_number(float(logged[k]))}"
        for k in shown
        if k in logged
    )


def _number(value: float) -> str:
    """Three decimals; a term that is smaller is not shown as 0.

    >>> _number(-0.0000079), _number(0.0), _number(33.0)
    ('-7.9e-06', '0.000', '33.000')
    """
    return f"{value:.3f}" if value == 0 or not abs(value) < 1e-3 else f"{value:.1e}"


class _Bar(Progress):
    """A bar, and below it the terms: side by side they do not fit in 100 columns."""

    said = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.said)


class Terminal(Callback):
    """Header, progress and figures of a run.

    Args:
        name: what the run is called.
        about: what the header says, a line each.
        labelled: whether accuracy means anything.
        bar: whether a bar is drawn; if not given, it is where nothing goes into a pipe or a file.
    """

    def __init__(
        self, name: str, about: list[str], *, labelled: bool, bar: bool | None = None
    ) -> None:
        self.name, self.about, self.labelled = name, about, labelled
        self._console = Console(stderr=True)
        self._progress: _Bar | None = None
        self._bar = sys.stdout.isatty() and sys.stderr.isatty() if bar is None else bar
        self._began = self._epoch_began = self._line = time.perf_counter()
        self._steps = self._epoch_steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            for line in self.about:
                tell(line)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._began = self._epoch_began = self._line = time.perf_counter()
        if self._bar and trainer.is_global_zero:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(None, table_column=Column(ratio=1)),  # what the words leave
                TextColumn("{task.fields[at]}"),
            )
            self._progress = _Bar(*columns, console=self._console, transient=True, expand=True)
            self._progress.add_task("", total=None, at="")
            self._progress.start()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._epoch_began, self._epoch_steps = time.perf_counter(), 0

    def _pace(self, trainer: Trainer, batch_idx: float) -> tuple[float, float]:
        """Images a second in this epoch, and seconds left of the run at this leg's pace."""
        now = time.perf_counter()
        done = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
        left = (trainer.max_epochs or 0) * trainer.num_training_batches - done
        images = self._epoch_steps * self._batch_size * trainer.world_size
        return images / (now - self._epoch_began), left * (now - self._began) / max(1, self._steps)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self._steps += 1
        self._epoch_steps += 1
        self._batch_size = len(batch[-1])  # the labels, also in linear evaluation
        now, every = time.perf_counter(), OF_BAR if self._progress else BETWEEN
        if now - self._line < every or trainer.is_last_batch:
            return
        self._line = now
        images, left = self._pace(trainer, batch_idx)
        said = figures(dict(trainer.callback_metrics), labelled=self.labelled, ending="_step")
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        step = f"step {batch_idx + 1}/{trainer.num_training_batches}"
        pace = f"{images:.0f} images/s  {duration(left)} left"
        if self._progress is None:
            print(f"{self.name}  {epoch}  {step}  {said}  {pace}", flush=True)
        else:
            self._progress.said = said
            self._progress.update(
                self._progress.task_ids[0],
                description=f"{self.name}  {epoch}",
                completed=batch_idx + 1,
                total=trainer.num_training_batches,
                at=pace,
            )

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._line = time.perf_counter()
        images, left = self._pace(trainer, trainer.num_training_batches - 1)
        said = figures(dict(trainer.callback_metrics), labelled=self.labelled)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        seconds = time.perf_counter() - self._epoch_began
        pace = f"{images:.0f} images/s  {duration(left)} left"
        line = f"{self.name}  {epoch}  {seconds:.1f} s  {said}  {pace}"
        # above the bar, if there is one
        print(line, flush=True) if self._progress is None else self._progress.print(line)

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        self._end()
