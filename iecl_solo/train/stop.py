"""Signals that end a run: it saves first, and the same command resumes it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

#: Ctrl-C; what ``kill`` and schedulers send; the notice of a scheduler that a job's time is over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal ended the run.

    Args:
        number: the signal's.
        said: what was saved, and how to go on.
    """

    def __init__(self, number: int, said: str) -> None:
        self.number, self.said = number, said
        super().__init__(f"{signal.Signals(number).name}: {said}")

    @property
    def code(self) -> int:
        """The exit code that a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class Signals:
    """Takes the signals while a run lasts.

    Between two steps a signal ends the run at once; during one it waits for the step's end, where
    ``received`` is looked at. A second one does not wait.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stepping = False

    def take(self) -> None:
        """Become the handler; Lightning puts its own in place when training begins."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        again, self.received = self.received is not None, number
        if again or not self.stepping:
            raise Stopped(number, "stopped")

    @contextmanager
    def taken(self) -> Iterator[Signals]:
        """For as long as the block lasts; what was there before comes back."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    if handler is not None:
                        signal.signal(number, handler)


def requeue() -> str | None:
    """Give SLURM's job back to its queue; None outside of a job, else what came of it."""
    job = os.environ.get("SLURM_JOB_ID")
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if job is None or re.fullmatch(r"[0-9_]+", job) is None:
        return None
    with suppress(OSError):
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode == 0:
            return f"job {job} is queued again"
        return f"job {job} could not be queued again ({done.stderr.strip().splitlines()[:1]})"
    return f"job {job} could not be queued again (no scontrol here)"
