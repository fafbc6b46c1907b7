"""A function in fresh processes: they fail together, say why in one line, and outlive no one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from iecl_solo.errors import IECLError
from iecl_solo.quiet import quiet
from iecl_solo.train.stop import NOTICES, Stopped, noticed

#: Seconds that a process is given to end by itself once another one has failed, or it was told to.
GRACE = 20.0

#: Seconds that a process is given to save what it has, once a scheduler's signal was handed on.
SAVING = 60.0

_INTERRUPTED = 130

#: Who launches one process a device; then this package launches none.
_LAUNCHERS = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID")


def launched() -> bool:
    """Whether this process is one of several already: torchrun's, SLURM's tasks, or ours."""
    if any(name in os.environ for name in _LAUNCHERS):
        return True
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def ranks(devices: int, num_nodes: int = 1) -> list[dict[str, str]]:
    """The environment of each process of this node, as Lightning and ``env://`` read it.

    Where there are several nodes, MASTER_ADDR, MASTER_PORT and NODE_RANK are taken as they are.

    >>> [r["LOCAL_RANK"] for r in ranks(2)], ranks(2)[0]["WORLD_SIZE"]
    (['0', '1'], '2')
    """
    node = int(os.environ.get("NODE_RANK", 0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
        "NODE_RANK": str(node),
        "WORLD_SIZE": str(devices * num_nodes),
    }
    return [
        {**shared, "LOCAL_RANK": str(i), "RANK": str(node * devices + i)} for i in range(devices)
    ]


@contextmanager
def variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process's environment, for what is started within the block."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _leave_with_parent() -> None:
    """End this process when its parent is gone, however that went: the pipe to it then closes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # Lightning ends its loaders, and its step
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _child(
    errors: connection.Connection,
    several: bool,
    method: str | None,
    target: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    _leave_with_parent()
    # a loader's workers start as in the parent: what is spawned spawns in turn, and the hosts'
    # data sets, which are local classes, cannot be pickled for that
    multiprocessing.set_start_method(method, force=True)
    if several:  # one task of SLURM's that has several devices: it launches nothing itself
        os.environ.pop("SLURM_NTASKS", None)
    code = 0
    with quiet():
        try:
            with noticed():
                target(*args)
        except IECLError as error:
            errors.send(str(error))
            code = 2
        except Stopped as stopped:
            errors.send(stopped.said)
            code = stopped.code
        except KeyboardInterrupt:
            code = _INTERRUPTED
        except Exception:
            errors.send(traceback.format_exc())
            code = 1
    if several:
        # torch takes gloo's threads down with the interpreter, which now and then aborts a
        # finished process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def in_processes(
    target: Callable[..., None], *args: Any, environments: Sequence[Mapping[str, str]] = ({},)
) -> None:
    """Run ``target`` in one fresh process for each of ``environments``, and wait for them.

    The first one that fails ends the others. A signal is handed on to them, and they save; all of
    them end when this process does, killed or not.

    Args:
        target: a module's function; it and ``args`` are pickled.
        args: what it is given.
        environments: variables that are set in each process before it starts.

    Raises:
        IECLError: what went wrong in the first that failed; which signal killed it, if one did.
        Stopped: when a signal ended them; KeyboardInterrupt, when nothing had begun.
    """
    context = multiprocessing.get_context("spawn")
    method = multiprocessing.get_start_method(allow_none=True)
    children: list[tuple[BaseProcess, connection.Connection]] = []
    try:
        for environment in environments:
            ours, theirs = context.Pipe(duplex=False)
            several = len(environments) > 1
            given = (theirs, several, method, target, args)
            process = context.Process(target=_child, args=given)
            # there before the first import, when Lightning reads its rank
            with variables(environment):
                process.start()
            theirs.close()
            children.append((process, ours))
        processes = [process for process, _ in children]
        with _Told(processes).listening() as told:
            failed = _wait(processes, told)
    except KeyboardInterrupt:
        _join([process for process, _ in children])  # a terminal has told them too
        raise
    finally:
        ended_by_us = _end([process for process, _ in children])
    if told.late:
        raise IECLError(f"the run was ended, {SAVING:.0f} s after a signal: it had not saved")
    if failed:
        codes = [None if p in ended_by_us else p.exitcode for p, _ in children]
        _raise(codes, [_heard(ours) for _, ours in children])


class _Told:
    """What a scheduler sends is handed on: to end, or that the time is nearly over."""

    def __init__(self, processes: list[BaseProcess]) -> None:
        self._processes = processes
        self._since: float | None = None

    def __call__(self, number: int, _: Any) -> None:
        self._since = self._since or time.monotonic()
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    @property
    def late(self) -> bool:
        """Whether they were told, and had their time."""
        return self._since is not None and time.monotonic() - self._since > SAVING

    @contextmanager
    def listening(self) -> Iterator[_Told]:
        """Takes the signals for as long as the block lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        wanted = (signal.SIGTERM, *NOTICES)
        before = {number: signal.signal(number, self) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def _wait(processes: list[BaseProcess], told: _Told) -> bool:
    """Until all have ended, one has failed, or one is too late to save after a signal."""
    while running := [process for process in processes if process.exitcode is None]:
        connection.wait([process.sentinel for process in running], timeout=1.0)
        if any(process.exitcode for process in processes) or told.late:
            return True
    return any(process.exitcode for process in processes)


def _heard(pipe: connection.Connection) -> str | None:
    """What a child said, if it did: one that was killed only let go of its pipe."""
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:
        return None


def _join(processes: list[BaseProcess], seconds: float = GRACE) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _end(processes: list[BaseProcess]) -> set[BaseProcess]:
    """End what still runs: asked first, then killed. Those that had to be."""
    _join(processes, 2.0 if any(p.exitcode for p in processes) else 0.0)  # their peers' end too
    running = {process for process in processes if process.is_alive()}
    for process in running:
        process.terminate()
    _join(list(running))
    for process in running:
        process.kill()
        process.join()
    return running


def _raise(codes: Sequence[int | None], said: Sequence[str | None]) -> None:
    """The error that tells most: a signal's victim says nothing, and its peers only lost it."""
    several = len(codes) > 1
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            who = f"the process of rank {rank}" if several else "the run"
            raise IECLError(f"{who} was killed by {signal.Signals(-code).name}")
    for wanted in (2, 1):
        for rank, (code, text) in enumerate(zip(codes, said, strict=True)):
            if code == wanted and text:
                if wanted == 2 or not several:
                    raise IECLError(text)
                raise IECLError(f"{text.rstrip()} (rank {rank} of {len(codes)})")
    for code, text in zip(codes, said, strict=True):
        if code is not None and code > 128:
            if text is None:
                raise KeyboardInterrupt
            raise Stopped(code - 128, text, queued=True)  # the first of them has asked
    raise IECLError("a process of the run ended without a word")
