"""What the devices of this machine are good at."""

from __future__ import annotations

from pathlib import Path

import torch

# of a CPU that multiplies bfloat16 matrices at more than float32's speed
_FAST_BF16 = ("avx512_bf16", "amx_bf16")


def fast_bf16(cpu: bool) -> str | None:
    """Why bfloat16 is faster than float32 on the CPU, or the GPU, here; None if it is not.

    >>> fast_bf16(cpu=True) in (None, "the CPU has avx512_bf16", "the CPU has amx_bf16")
    True
    """
    if not cpu:
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
        return f"{torch.cuda.get_device_name()} has bfloat16" if fast else None
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.is_file() else []
    return next((f"the CPU has {flag}" for flag in _FAST_BF16 if flag in flags), None)


def cuda_or_cpu() -> str:
    """Where what is measured here is computed: CUDA where there is one, else the CPU.

    >>> cuda_or_cpu() in ("cuda", "cpu")
    True
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_cpu(accelerator: str) -> bool:
    """Whether Lightning's ``accelerator`` means the CPU on this machine.

    >>> on_cpu("cpu"), on_cpu("gpu")
    (True, False)
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not accelerated)


def choose_precision(given: str, cpu: bool) -> str:
    """What ``precision: auto`` is here: bf16-mixed where it is fast, 32-true elsewhere.

    16-mixed on a CPU is bf16-mixed, as Lightning has it. Any other precision stays as it is.

    >>> choose_precision("auto", cpu=True) in ("bf16-mixed", "32-true")
    True
    >>> choose_precision("16-mixed", cpu=True), choose_precision("32-true", cpu=True)
    ('bf16-mixed', '32-true')
    """
    if given == "auto":
        return "bf16-mixed" if fast_bf16(cpu) else "32-true"
    return "bf16-mixed" if given == "16-mixed" and cpu else given
