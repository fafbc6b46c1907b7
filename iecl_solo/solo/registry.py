"""The one list of all that is added to the host, read top to bottom."""

from __future__ import annotations

from itertools import combinations

from omegaconf import DictConfig

from iecl_solo import checks, methods
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.methods.minc import MINC
from iecl_solo.methods.protocol import Method
from iecl_solo.methods.spectral import Spectral
from iecl_solo.objectives.climb import CLIMB
from iecl_solo.objectives.iecl import IECL
from iecl_solo.objectives.protocol import Objective
from iecl_solo.solo.config import dump_block, parse_block, plain
from iecl_solo.solo.host import find_host
from iecl_solo.solo.method import host_method
from iecl_solo.solo.wrapper import REFUSED, with_objective

#: Methods of their own, beside the host's.
WHOLE: tuple[type[Method], ...] = (Spectral, MINC)

#: Each is added to every method of the host that can have it, as ``<objective>_<method>``, and so
#: is every combination of them, in this order: ``iecl_climb_<method>``.
OBJECTIVES: tuple[type[Objective], ...] = (IECL, CLIMB)

_registered: list[str] = []


def register() -> None:
    """Add all of the above to solo-learn's registries. Idempotent.

    Raises:
        HostNotFound: when there is no solo-learn.
    """
    # first: importing solo registers, by the note that on_import left
    host = find_host()
    if _registered:
        return
    host.register([objective.name for objective in OBJECTIVES])
    for method in WHOLE:
        _add(method.name, host_method(method))
    for name, host_class in list(host.methods.items()):
        if host_class.__name__ in REFUSED:
            continue
        for count in range(1, len(OBJECTIVES) + 1):
            for chosen in combinations(OBJECTIVES, count):
                _add(_joined([c.name for c in chosen], name), with_objective(host_class, *chosen))


def _add(name: str, added: type) -> None:
    added.__module__ = methods.__name__
    setattr(methods, added.__name__, added)
    find_host().methods[name] = added
    _registered.append(name)


def _joined(objectives: list[str], method: str) -> str:
    return "_".join([*objectives, method])


def split_method(name: str) -> tuple[list[str], str]:
    """The objectives that a method's name says it carries, and the method without them.

    >>> split_method("iecl_climb_simclr")
    (['iecl', 'climb'], 'simclr')
    """
    carried = []
    for objective in OBJECTIVES:
        if name.startswith(f"{objective.name}_"):
            carried.append(objective.name)
            name = name.removeprefix(f"{objective.name}_")
    return carried, name


def term_label(logged: str) -> tuple[str, str] | None:
    """What a report calls an objective's logged term, and its unit; None for any other value.

    >>> term_label("climb_entropy_bound"), term_label("val_acc1")
    (('upper bound on H(Z)', 'nats'), None)
    """
    for objective in OBJECTIVES:
        if logged.startswith(f"{objective.name}_"):
            term = logged.removeprefix(f"{objective.name}_")
            return objective.labels.get(term, (term.replace("_", " "), ""))
    return None


def query_name(objectives: list[str]) -> str:
    """What a method that carries these objectives calls the query's embeddings.

    >>> query_name([])
    'Z'
    """
    return next((o.query for o in OBJECTIVES if o.name in objectives and o.query != "Z"), "Z")


def shown_terms() -> list[str]:
    """Names, as they are logged over an epoch, of the terms that a run's line shows."""
    return [f"train_{o.name}_{term}_epoch" for o in OBJECTIVES for term in o.shown]


def choose_objectives(cfg: DictConfig) -> None:
    """Let the key ``objectives``, where there is one, say which objectives the method carries.

    ``method: simclr`` with ``objectives: [iecl, climb]`` becomes ``method: iecl_climb_simclr``, in
    place, whatever objectives the method's name had; blocks of others are dropped. Their order in
    the list does not matter.

    Raises:
        IECLError: one line, for a name that is no objective.
    """
    given = plain(cfg.pop("objectives", None))
    checks.text("method", plain(cfg.method))
    if given is None:
        return
    names = [objective.name for objective in OBJECTIVES]
    if not isinstance(given, list):
        raise IECLError(f"objectives: {given!r} is not allowed, a list out of {names} is")
    for name in given:
        if name not in names:
            raise IECLError(f"objectives: {unknown_name('value', name, names)}")
    cfg.method = _joined([name for name in names if name in given], split_method(cfg.method)[1])
    for name in names:
        if name not in given:
            cfg.pop(name, None)


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
        if split_method(cfg.method)[1] == method.name:
            kwargs = parse_block("method_kwargs", method.Config, cfg.get("method_kwargs"))
            cfg.method_kwargs = dump_block(kwargs)
    for objective in OBJECTIVES:
        if objective.name in split_method(cfg.method)[0]:
            config = parse_block(objective.name, objective.Config, cfg.get(objective.name))
            cfg[objective.name] = dump_block(config)
        elif cfg.get(objective.name) is not None:
            raise IECLError(
                f"{objective.name}: method '{cfg.method}' does not carry it; name it in "
                f"objectives, or leave the block out"
            )


def check_method(name: str) -> None:
    """Raise one line for a method that does not exist, or that was refused, with the reason."""
    register()
    host = find_host()
    if name in host.methods and host.methods[name].__name__ not in REFUSED:
        return
    host_class = host.methods.get(split_method(name)[1])
    if host_class is not None and host_class.__name__ in REFUSED:
        raise IECLError(f"method '{name}' is refused: {REFUSED[host_class.__name__]}")
    raise unknown_name(
        "method", name, [n for n, c in host.methods.items() if c.__name__ not in REFUSED]
    )
