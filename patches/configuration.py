"""How many devices, and which precision, a configuration of GitHub main asks for."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage

_MODULES = ("solo.args.pretrain", "solo.args.linear")


def device_count(devices: Any, accelerator: str) -> int:
    """How many devices Lightning makes of ``devices``.

    A list names them, a positive number is their number, and -1 or "auto" are all there are: one
    on an accelerator that has no list of its devices.

    Example:
        >>> device_count([0, 3], "gpu"), device_count(2, "cpu"), device_count("auto", "cpu")
        (2, 2, 1)
    """
    if not isinstance(devices, (int, str)):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([name for name in text.split(",") if name.strip()])
    if text.isdigit():
        return int(text)
    import torch

    return max(1, torch.cuda.device_count()) if accelerator in ("gpu", "cuda", "auto") else 1


def _modules() -> list[Any]:
    if importlib.util.find_spec("solo.args.pretrain") is None:
        return []
    return [importlib.import_module(name) for name in _MODULES]


def _only_lists_are_counted(_: Path) -> bool:
    return any("len(cfg.devices)" in inspect.getsource(m.parse_cfg) for m in _modules())


def _count_any_devices() -> None:
    from iecl_solo.devices import choose_precision, on_cpu  # torch, which --help can do without

    def counting(parse_cfg: Any) -> Any:
        @functools.wraps(parse_cfg)
        def parse(cfg: Any) -> Any:
            devices, accelerator = cfg.get("devices", "auto"), cfg.get("accelerator", "auto")
            count = device_count(devices, accelerator)
            cfg.devices = list(range(count))
            try:
                cfg = parse_cfg(cfg)
            finally:
                # Lightning takes no list of CPUs
                cfg.devices = count if on_cpu(accelerator) else devices
            if count == 1 and on_cpu(accelerator) and cfg.get("sync_batchnorm"):
                cfg.sync_batchnorm = False  # only GPUs have it, and one process needs none
            if cfg.get("precision") == "auto":  # iecl-solo's; Lightning has no such precision
                cfg.precision = choose_precision("auto", on_cpu(accelerator))
            return cfg

        return parse

    script = sys.modules["__main__"]
    for module in _modules():
        original = module.parse_cfg
        module.parse_cfg = counting(original)
        # the host's own script has imported it by name before Hydra could bring this package in
        if getattr(script, "parse_cfg", None) is original:
            script.parse_cfg = module.parse_cfg  # type: ignore[attr-defined]


DEVICE_COUNT = Patch(
    name="device-count",
    stage=Stage.AFTER_IMPORT,
    versions="GitHub main",
    symptom="devices: 1 fails in len(cfg.devices), devices: [0] with accelerator: cpu is refused "
    "by Lightning, and so is sync_batchnorm with strategy: ddp, so no configuration of the host's "
    "trains on a CPU",
    remedy="parse_cfg takes a number as well as a list, hands a CPU run its number and one process "
    "on a CPU no sync_batchnorm; it knows precision: auto too",
    present=_only_lists_are_counted,
    apply=_count_any_devices,
)
