"""Signals that end a run: it saves first, and the same command resumes it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

#: The notice of a scheduler that a job's time is over: what ``sbatch --signal`` is given by most,
#: and by submitit.
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)

#: Ctrl-C; what ``kill`` and schedulers send; their notice.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *NOTICES)


class Stopped(KeyboardInterrupt):
    """A signal ended the run.

    Args:
        number: the signal's.
        said: what was saved, and how to go on.
        queued: whether SLURM was asked to queue the job again.
    """

    def __init__(self, number: int, said: str, *, queued: bool = False) -> None:
        self.number, self.said, self.queued = number, said, queued
        super().__init__(f"{signal.Signals(number).name}: {said}")

    @property
    def code(self) -> int:
        """The exit code that a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class Signals:
    """Takes the signals while a run lasts.

    Between two steps a signal ends the run at once; during one it waits for the step's end, where
    ``received`` is looked at. A second one, of Ctrl-C or SIGTERM, does not wait.

    Args:
        numbers: which.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = SIGNALS) -> None:
        self.numbers = numbers
        self.received: int | None = None
        self.stepping = False
        self._told = False  # to end, and not by a notice

    def take(self) -> None:
        """Become the handler; Lightning puts its own in place when training begins."""
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        # a notice that comes twice, from SLURM and handed on by a parent, is one; and it stays what
        # ended the run when SLURM sends SIGTERM after it
        if number in NOTICES and self.received in NOTICES:
            return
        again = self._told and number not in NOTICES
        self._told |= number not in NOTICES
        if self.received not in NOTICES:
            self.received = number
        if again or not self.stepping:
            raise Stopped(number, "stopped")

    @contextmanager
    def taken(self) -> Iterator[Signals]:
        """For as long as the block lasts; what was there before comes back."""
        before = {number: signal.getsignal(number) for number in self.numbers}
        self.take()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    if handler is not None:
                        signal.signal(number, handler)


def queued_again(stopped: Stopped) -> Stopped:
    """What stopped a run, once SLURM was asked to queue the job again after its notice.

    Of several processes the first one asks, and of several calls for one signal the first.
    """
    job = _job()
    if job is None or stopped.queued or stopped.number not in NOTICES:
        return stopped
    if getattr(rank_zero_only, "rank", 0):
        return stopped
    print(f"{stopped}; job {job} goes back to its queue", flush=True)  # which may end it at once
    return Stopped(stopped.number, f"{stopped.said}; {requeue(job)}", queued=True)


@contextmanager
def noticed() -> Iterator[None]:
    """A scheduler's notice ends the block, wherever it is, and the job is queued again.

    For what is not training, which takes more signals and saves first.

    Raises:
        Stopped: when a notice ended it.
    """
    with Signals(NOTICES).taken():
        try:
            yield
        except Stopped as stopped:
            raise queued_again(stopped) from None


def _job() -> str | None:
    """SLURM's name of the job that this process is of."""
    job = os.environ.get("SLURM_JOB_ID")
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return job if job is not None and re.fullmatch(r"[0-9_]+", job) else None


def requeue(job: str) -> str:
    """Give SLURM's job back to its queue, and say what came of it."""
    with suppress(OSError):
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode == 0:
            return f"job {job} is queued again"
        return f"job {job} could not be queued again ({done.stderr.strip().splitlines()[:1]})"
    return f"job {job} could not be queued again (no scontrol here)"
