"""The one way from a composed configuration to one that can be trained."""

from __future__ import annotations

from functools import cache

from omegaconf import DictConfig, OmegaConf

from iecl_solo import checks, devices
from iecl_solo.solo.config import parse_block
from iecl_solo.solo.host import Host
from iecl_solo.solo.registry import check_method, choose_objectives, complete_objective
from iecl_solo.solo.settings import check_data, prepare_pretrain, process_count, require
from iecl_solo.train.callbacks.entropy_monitor import MonitorConfig
from iecl_solo.train.checks import check_classes, check_device_count, check_loggers, on_cpu
from iecl_solo.train.run import check_name

#: What ``precision`` may be. Whole networks in bfloat16 or float64 are not: the hosts' losses and
#: queues are float32.
PRECISIONS = ("auto", "32-true", "16-mixed", "bf16-mixed")
# Lightning's shorter names
_SHORT = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@cache
def _say_once(line: str) -> None:
    """Once a process: a benchmark completes the configuration of every cell before the first."""
    print(line, flush=True)


def precision(cfg: DictConfig) -> str:
    """The precision that a configuration trains in on this machine.

    ``auto`` is bf16-mixed where the device computes it fast, 32-true elsewhere. 16-mixed on a CPU
    is bf16-mixed, as Lightning has it. A line says where bfloat16 is slow.

    Raises:
        IECLError: one line, for a precision that is none of ``PRECISIONS``.
    """
    given = cfg.get("precision")
    given = "32-true" if given is None else str(given)
    given = _SHORT.get(given, given)
    checks.one_of("precision", given, PRECISIONS)
    cpu = on_cpu(cfg)
    if given == "16-mixed" and cpu:
        _say_once("precision: 16-mixed is bf16-mixed on a CPU, which has no float16")
    chosen = devices.choose_precision(given, cpu)
    if chosen == "bf16-mixed" and cpu and not devices.fast_bf16(cpu):
        slow = "this CPU computes bfloat16 many times slower than float32"
        _say_once(f"precision: {slow}; precision=auto takes 32-true here")
    return chosen


def _complete_checkpoint(cfg: DictConfig) -> None:
    """``checkpoint:`` with all its values."""
    for key, value in {"enabled": False, "frequency": 1, "every_n_steps": 0, "keep": 2}.items():
        if cfg.checkpoint.get(key) is None:
            cfg.checkpoint[key] = value


def complete(cfg: DictConfig, host: Host) -> DictConfig:
    """Check a pretraining configuration and fill in all that it leaves open.

    Every command that trains, plans or measures a method comes through here, so that all of them
    accept and refuse the same.

    Args:
        cfg: as composed, in solo-learn's schema; changed in place.
        host: the solo-learn in use.

    Returns:
        The configuration, every value of a run's record in it.

    Raises:
        IECLError: one line for whatever it gets wrong.
    """
    OmegaConf.set_struct(cfg, False)
    require(cfg, ["method"])
    choose_objectives(cfg)
    check_method(cfg.method)
    if cfg.get("name"):
        cfg.name = check_name(cfg.name)
    cfg = prepare_pretrain(cfg, host)
    check_device_count(cfg)
    if process_count(cfg) > 1:
        check_data(cfg, processes=process_count(cfg))
    check_loggers(cfg)
    check_classes(cfg)
    complete_objective(cfg)
    cfg.precision = precision(cfg)
    _complete_checkpoint(cfg)
    parse_block("monitor", MonitorConfig, cfg.get("monitor"))
    return cfg
