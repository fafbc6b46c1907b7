"""What a run costs: seconds a step, peak memory, parameters."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

# the first steps pay for allocation, autotuning and compilation
WARMUP_STEPS = 5


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: ru_maxrss begins with that of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


def reset_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory_bytes`` begin now; of the whole process where that is not possible.

    A benchmark trains its cells one after the other in one process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")


class CostMonitor(Callback):
    """Times every training step, from its batch being there to its update being made.

    Its state goes into the checkpoint, so that a run's cost is that of all its legs.

    Attributes:
        steps: seconds of each step, in order; of earlier legs the last thousand.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._start = 0.0
        self._began = time.perf_counter()
        self._before: dict[str, float] = {"seconds": 0.0, "peak_memory_bytes": 0}

    @property
    def seconds(self) -> float:
        """Since this object was made, and in the legs before."""
        return self._before["seconds"] + time.perf_counter() - self._began

    def _now(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()

    def _peak(self, device: torch.device) -> float:
        return max(self._before["peak_memory_bytes"], peak_memory_bytes(device))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        reset_peak_memory(self._device)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = self._now(module)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(self._now(module) - self._start)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps[-1000:],
            "seconds": self.seconds,
            "peak_memory_bytes": self._peak(self._device),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = {name: state_dict[name] for name in self._before}
        self.steps = list(state_dict["steps"])

    def summary(self, module: LightningModule) -> dict[str, float]:
        """Median seconds a step, peak memory in bytes, parameters in training and in all."""
        timed = self.steps[WARMUP_STEPS:] or self.steps
        trained = {p for p in module.parameters() if p.requires_grad}
        return {
            "seconds_per_step": statistics.median(timed) if timed else float("nan"),
            "peak_memory_bytes": self._peak(module.device),
            "trained_parameters": sum(p.numel() for p in trained),
            "parameters": sum(p.numel() for p in module.parameters()),
        }
