"""What an add-on costs: its step against its baseline's, in turn, in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from iecl_solo.errors import unknown_name
from iecl_solo.solo.build import build_model
from iecl_solo.solo.config import plain
from iecl_solo.solo.host import Host
from iecl_solo.train.complete import complete

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    steps: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    device: torch.device | str = "cpu",
) -> list[list[float]]:
    """Seconds of each of ``steps``, called in turn, so that a busy machine slows all of them alike.

    Args:
        steps: what to time.
        rounds: how often each is timed; the order is turned round every other time.
        warmup: rounds before, that do not count.
        device: waited for before a clock is read.

    Returns:
        One list of ``rounds`` seconds for each step.

    Example:
        >>> a, b = interleaved([lambda: None, lambda: time.sleep(0.01)], rounds=3)
        >>> len(a), min(b) > max(a)
        (3, True)
    """
    device = torch.device(device)
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(warmup + rounds):
        order = range(len(steps)) if turn % 2 else reversed(range(len(steps)))
        for i in order:
            _synchronize(device)
            start = time.perf_counter()
            steps[i]()
            _synchronize(device)
            if turn >= warmup:
                seconds[i].append(time.perf_counter() - start)
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of b / a, paired by round.

    >>> ratio([1.0, 2.0, 1.0, 2.0], [1.1, 2.2, 1.1, 2.2])
    (1.1, 1.1, 1.1)
    """
    paired = [y / x for x, y in zip(a, b, strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
    return middle, low, high


class Step:
    """A method's whole training step on one fixed batch, without a trainer around it.

    Forward, backward, optimiser, and the momentum update where the method has one.

    Args:
        cfg: a pretraining configuration as composed; ``precision`` is taken from it.
        host: the solo-learn in use.
        device: where it runs.

    Raises:
        IECLError: for what the configuration gets wrong, or a precision that is not known.
    """

    def __init__(self, cfg: DictConfig, host: Host, device: torch.device | str = "cpu") -> None:
        cfg = complete(OmegaConf.create(plain(cfg)), host)
        if cfg.precision not in _AUTOCAST:
            raise unknown_name("precision", str(cfg.precision), _AUTOCAST)
        self.device, self.dtype = torch.device(device), _AUTOCAST[cfg.precision]
        seed_everything(cfg.seed, verbose=False)
        self.model: LightningModule = build_model(cfg, host).to(self.device).train()
        if OmegaConf.select(cfg, "performance.compile", default=False):
            getattr(self.model, host.online).compile()
        self._detach_from_trainer(cfg.max_epochs)
        configured: Any = self.model.configure_optimizers()
        self.optimizer = (configured[0] if isinstance(configured, tuple) else [configured])[0]
        size = cfg.optimizer.batch_size
        crops = [a.crop_size for a in cfg.augmentations for _ in range(a.num_crops)]
        views = [torch.randn(size, 3, c, c, device=self.device) for c in crops]
        labels = torch.randint(0, cfg.data.num_classes, (size,), device=self.device)
        self.batch = [torch.arange(size, device=self.device), views, labels]

    def _detach_from_trainer(self, max_epochs: int) -> None:
        # what the hosts' steps ask a trainer for, and no more
        self.model._trainer = SimpleNamespace(  # type: ignore[assignment]
            current_epoch=0,
            global_step=0,
            max_epochs=max_epochs,
            num_training_batches=100,
            estimated_stepping_batches=100 * max_epochs,
            train_dataloader=range(100),
            accumulate_grad_batches=1,
            world_size=1,
        )
        for name in ("log", "log_dict"):
            setattr(self.model, name, lambda *_, **__: None)
        self.model.on_train_start()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def __call__(self) -> None:
        with self._autocast():
            loss: Any = self.model.training_step(self.batch, 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.model._trainer.global_step += 1  # type: ignore[union-attr, misc]
        if hasattr(self.model, "momentum_updater"):
            self.model.on_train_batch_end({"loss": loss.detach()}, self.batch, 0)

    def flops(self) -> float:
        """Floating-point operations of one step, forward and backward."""
        counter = FlopCounterMode(display=False)
        with counter:
            self()
        return float(counter.get_total_flops())

    def parameters(self) -> int:
        """Number of parameters, the momentum network's included."""
        return sum(p.numel() for p in self.model.parameters())

    def peak_memory(self) -> float:
        """Bytes of tensors held at the height of one step: weights, moments, activations.

        On CUDA the allocator's own count; on a CPU counted from the profiler's record of every
        allocation, so that it is the same every time.
        """
        self()  # the optimiser's moments are there from now on
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self()
            return float(torch.cuda.max_memory_allocated(self.device))
        held = _bytes(self.model.state_dict()) + _bytes(self.optimizer.state) + _bytes(self.batch)
        self.optimizer.zero_grad(set_to_none=True)  # what was allocated earlier is not seen to go
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs lines of its own to stderr
        activity = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
            self()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        return float(held + max(accumulate(changes), default=0))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def measure_cost(
    cfg: DictConfig,
    baseline: DictConfig | None,
    host: Host,
    *,
    rounds: int = 20,
    device: torch.device | str,
) -> dict[str, float]:
    """What a method's step costs, and how that compares with its baseline's.

    Args:
        cfg: of the method.
        baseline: of what it is compared with; None for a baseline itself.
        host: the solo-learn in use.
        rounds: timed steps of each.
        device: where they run.

    Returns:
        ``seconds_per_step`` (median), ``peak_tensor_bytes``, ``flops`` (a step's) and
        ``parameters``; with a baseline also ``time_ratio`` with its quartiles ``time_ratio_low``
        and ``time_ratio_high``, ``memory_ratio``, ``flops_ratio`` and ``parameters_ratio``.
    """
    absolute: list[dict[str, float]] = []
    for own in (cfg, baseline):
        if own is not None:  # one after the other, so that neither's memory counts for the other
            step = Step(own, host, device)
            absolute.append(
                {
                    "peak_tensor_bytes": step.peak_memory(),
                    "flops": step.flops(),
                    "parameters": step.parameters(),
                }
            )
            del step
    steps = [Step(own, host, device) for own in (cfg, baseline) if own is not None]
    seconds = interleaved(steps, rounds, device=device)
    out = {"seconds_per_step": statistics.median(seconds[0]), **absolute[0]}
    if baseline is not None:
        middle, low, high = ratio(seconds[1], seconds[0])
        out |= {"time_ratio": middle, "time_ratio_low": low, "time_ratio_high": high}
        for name, short in (
            ("peak_tensor_bytes", "memory"),
            ("flops", "flops"),
            ("parameters", "parameters"),
        ):
            out[f"{short}_ratio"] = absolute[0][name] / absolute[1][name]
    return out
