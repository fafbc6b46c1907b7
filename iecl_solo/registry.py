"""The one list of all that is added to the host, read top to bottom."""

from __future__ import annotations

from omegaconf import DictConfig

from iecl_solo import methods
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.methods.minc import MINC
from iecl_solo.methods.spectral import Spectral
from iecl_solo.objectives.iecl import IECL
from iecl_solo.solo.backbones import register_backbones
from iecl_solo.solo.config import dump_block, parse_block
from iecl_solo.solo.host import find_host
from iecl_solo.solo.method import host_method
from iecl_solo.solo.wrapper import REFUSED, with_objective

#: Methods of their own, beside the host's.
WHOLE = (Spectral, MINC)

#: Each is added to every method of the host that can have it, as ``<objective>_<method>``.
OBJECTIVES = (IECL,)

_registered: list[str] = []


def register() -> None:
    """Add all of the above to solo-learn's registries. Idempotent.

    Raises:
        HostNotFound: when there is no solo-learn.
    """
    if _registered:
        return
    host = find_host()
    register_backbones(host, [objective.name for objective in OBJECTIVES])
    for method in WHOLE:
        _add(method.name, host_method(method))
    for name, host_class in list(host.methods.items()):
        if host_class.__name__ in REFUSED:
            continue
        for objective in OBJECTIVES:
            _add(f"{objective.name}_{name}", with_objective(host_class, objective))


def _add(name: str, added: type) -> None:
    added.__module__ = methods.__name__
    setattr(methods, added.__name__, added)
    find_host().methods[name] = added
    _registered.append(name)


def added_methods() -> list[str]:
    """Names that ``register`` added to ``METHODS``."""
    register()
    return list(_registered)


def complete_objective(cfg: DictConfig) -> None:
    """Fill in the blocks that are ours, so that a run's record names every value.

    Raises:
        IECLError: one line for whatever the block gets wrong.
    """
    for method in WHOLE:
        if cfg.method.rpartition("_")[2] == method.name:
            kwargs = parse_block("method_kwargs", method.Config, cfg.get("method_kwargs"))
            cfg.method_kwargs = dump_block(kwargs)
    for objective in OBJECTIVES:
        if cfg.method.startswith(f"{objective.name}_"):
            config = parse_block(objective.name, objective.Config, cfg.get(objective.name))
            cfg[objective.name] = dump_block(config)


def check_method(name: str) -> None:
    """Raise one line for a method that does not exist, or that was refused, with the reason."""
    register()
    host = find_host()
    if name in host.methods and host.methods[name].__name__ not in REFUSED:
        return
    for objective in OBJECTIVES:
        host_class = host.methods.get(name.removeprefix(f"{objective.name}_"))
        if host_class is not None and host_class.__name__ in REFUSED:
            raise IECLError(f"method '{name}' is refused: {REFUSED[host_class.__name__]}")
    raise unknown_name(
        "method", name, [n for n, c in host.methods.items() if c.__name__ not in REFUSED]
    )
