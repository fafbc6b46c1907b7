"""A command's configuration: composed by Hydra from packaged files or own ones, run or launched.

One run is composed here and handed on. Several (``--multirun``, the cells of a benchmark), and what
Hydra answers itself (``--cfg``, ``--info``), go through ``hydra.main``, and with it any launcher.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iecl_solo.errors import IECLError, one_line, unknown_name
from iecl_solo.quiet import quiet
from iecl_solo.train.packaged import PACKAGED, check_packaged, packaged_configs
from iecl_solo.version import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: What Hydra is told, and answers or launches itself.
MULTIRUN = ("--multirun", "-m")
_ANSWERED = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd")


# a run keeps its own record; Hydra's would be written even for a run that is refused
_NO_FILES = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",  # "disabled" silences the user's own loggers, and leaves them so
    "hydra/hydra_logging=none",
)


@dataclass(frozen=True)
class Invocation:
    """What was typed after ``iecl-solo <command>``.

    Attributes:
        command: the command's name.
        path: folder of the configuration, or ``PACKAGED``.
        name: the configuration's name within it.
        flags: what begins with a dash, ``--config-name`` and ``--config-path`` aside.
        overrides: the rest, in Hydra's grammar.
        typed: the whole of it.
    """

    command: str
    path: str
    name: str
    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)

    @property
    def multirun(self) -> bool:
        """Whether each combination of values is a run."""
        return any(flag in MULTIRUN for flag in self.flags)

    @property
    def answered(self) -> bool:
        """Whether Hydra answers it, and nothing is run."""
        return any(flag in _ANSWERED for flag in self.flags)

    @property
    def line(self) -> str:
        """The command line."""
        return shlex.join(["iecl-solo", self.command, *self.typed])

    def job(self, overrides: Sequence[str]) -> Invocation:
        """One of its jobs, as if that had been typed."""
        own_file = self.path != PACKAGED
        name = self.name if own_file else self.name.partition("/")[2]
        source = ["--config-path", self.path] if own_file else []
        typed = [*source, "--config-name", name, *overrides]
        return replace(self, flags=[], overrides=list(overrides), typed=typed)

    def gives(self, key: str) -> bool:
        """Whether a value for the key was typed, or is in a YAML of one's own."""
        typed = any(o.lstrip("+").partition("=")[0] == key for o in self.overrides)
        return typed or self.path != PACKAGED


def grouped(names: Sequence[str]) -> list[str]:
    """Names as lines, those of one folder together, and folders of the same names.

    >>> grouped(["cifar/byol", "cifar/simclr", "default", "stl10/byol", "stl10/simclr"])
    ['  default', '  cifar/, stl10/', '    byol    simclr']
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    lines = [f"  {name}" for name in folders.pop("", [])]
    alike: dict[tuple[str, ...], list[str]] = {}
    for folder in sorted(folders):
        alike.setdefault(tuple(folders[folder]), []).append(f"{folder}/")
    for members, where in alike.items():
        lines.append(f"  {', '.join(where)}")
        width = max(map(len, members)) + 2
        columns = max(1, 92 // width)
        for i in range(0, len(members), columns):
            row = "".join(f"{m:<{width}}" for m in members[i : i + columns])
            lines.append(f"    {row.rstrip()}")
    return lines


def asks_help(arguments: Sequence[str]) -> bool:
    """Whether the command's help is asked for."""
    return "--help" in arguments or "-h" in arguments


def help_text(command: str, folder: str, what: str) -> str:
    """The text of ``iecl-solo <command> --help``."""
    return "\n".join(
        [
            f"usage: iecl-solo {command} --config-name NAME [KEY=VALUE ...]",
            "",
            f"{what[0].upper()}{what[1:]}.",
            "",
            "  --config-name NAME   one of the packaged configurations below, FOLDER/NAME",
            "  --config-path DIR    take NAME from your own folder, relative to where you stand",
            "  KEY=VALUE            override any key, e.g. optimizer.batch_size=128 iecl.beta=0.1",
            "  --cfg job            print the composed configuration and stop",
            "  --multirun           one run for each combination of KEY=A,B,C",
            "",
            "packaged configurations:",
            *grouped(packaged_configs(folder)),
        ]
    )


def _take(arguments: list[str], *flags: str) -> tuple[str | None, list[str]]:
    """The value of the first of ``flags`` that is given, and the other arguments."""
    for i, argument in enumerate(arguments):
        for flag in flags:
            if argument == flag and i + 1 < len(arguments):
                return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
            if argument.startswith(f"{flag}="):
                return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments


def read_arguments(command: str, folder: str, arguments: list[str]) -> Invocation:
    """Sort what was typed.

    Raises:
        IECLError: one line, for a configuration that does not exist.
    """
    name, rest = _take(arguments, "--config-name", "-cn")
    path, rest = _take(rest, "--config-path", "-cp")
    if name is None:
        raise IECLError(
            f"{command}: --config-name is missing; iecl-solo {command} --help lists the names"
        )
    flags: list[str] = []
    overrides: list[str] = []
    while rest:
        argument, *rest = rest
        if argument.startswith("-"):
            flags.append(argument)
            if argument in _WITH_VALUE and rest:
                flags.append(rest.pop(0))
        else:
            overrides.append(argument)
    name = name.removesuffix(".yaml")
    if path is None or path == PACKAGED:
        name = name.removeprefix(f"{folder}/")
        check_packaged(folder, name)
        return Invocation(command, PACKAGED, f"{folder}/{name}", flags, overrides, arguments)
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise IECLError(f"--config-path {path}: no such folder")
    if not (root / f"{name}.yaml").is_file():
        own = [p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")]
        raise unknown_name(f"config in {path}", name, own)
    return Invocation(command, str(root), name, flags, overrides, arguments)


def explain(error: Exception) -> IECLError:
    """Hydra's own errors in one line, with the nearest key where one was misspelt."""
    cause = error.__cause__ or error
    text = one_line(cause)
    key = getattr(cause, "key", None)
    parent = getattr(cause, "parent_node", None)
    if key is not None and parent is not None:
        near = difflib.get_close_matches(str(key), [str(k) for k in parent], 1, 0.5)
        text = f"unknown key {cause.full_key}"  # type: ignore[attr-defined]
        text += f": did you mean '{near[0]}'?" if near else ": use +KEY=VALUE to add a new one"
    override = getattr(error, "override", None)
    if override and "=" not in override:
        text = f"{override!r} is no KEY=VALUE; a path with a space is quoted: KEY='\"my photos\"'"
    elif override:
        given, _, value = str(override).partition("=")
        if '"' not in value and "'" not in value:
            text += f"; a space or a sign of the grammar is quoted: {given}='\"{value}\"'"
    return IECLError(text.partition(" full_key:")[0])


@contextmanager
def _one_line() -> Iterator[None]:
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise explain(error) from None


def composed(given: Invocation, overrides: Sequence[str] | None = None) -> DictConfig:
    """The configuration, its node ``hydra`` included.

    Args:
        given: what was typed.
        overrides: those that count, if not the typed ones.

    Raises:
        IECLError: one line for whatever is wrong with it.
    """
    from hydra import compose, initialize_config_dir, initialize_config_module

    from iecl_solo.train.compose import optional, own_hydra

    chosen = [*_NO_FILES, *optional(given.overrides if overrides is None else overrides)]
    with _one_line(), own_hydra():
        source: initialize_config_dir | initialize_config_module
        if given.path == PACKAGED:
            source = initialize_config_module("iecl_solo.configs", version_base="1.3")
        else:
            source = initialize_config_dir(given.path, version_base="1.3")
        with source:
            return compose(given.name, overrides=chosen, return_hydra_config=True)


@contextmanager
def _hydra_config(cfg: DictConfig) -> Iterator[None]:
    """Let ``${hydra:...}`` in a configuration be resolved, as under ``hydra.main``."""
    from hydra.core.hydra_config import HydraConfig

    singleton = HydraConfig.instance()
    before, singleton.cfg = singleton.cfg, None
    singleton.set_config(cfg)
    try:
        yield
    finally:
        singleton.cfg = before


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of a composed configuration, less Hydra's own node."""
    from omegaconf import OmegaConf

    OmegaConf.set_struct(cfg, False)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def launch(
    given: Invocation,
    task: Callable[[DictConfig], None],
    flags: Sequence[str],
    overrides: Sequence[str],
) -> None:
    """Hand over to ``hydra.main``: its sweeper, its launcher, its answers.

    Args:
        given: what was typed.
        task: what each job does.
        flags: of Hydra.
        overrides: of each job.

    Raises:
        IECLError: one line for whatever is wrong with the configuration.
    """
    import hydra

    from iecl_solo.train.compose import optional

    typed = list(sys.argv)

    def job(cfg: DictConfig) -> None:
        sys.argv[:] = typed  # what a child of this process sees is what was typed
        task(cfg)

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the error can be told in one line
    # flags first: argparse takes its positional arguments in one piece
    sys.argv[:] = [typed[0], *flags, *_NO_FILES, *optional(overrides)]
    main = hydra.main(version_base="1.3", config_path=given.path, config_name=given.name)
    try:
        with _one_line():
            main(job)()
    finally:
        sys.argv[:] = typed
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _swept(given: Invocation) -> list[str]:
    """Keys of which several values were typed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _one_line():
        parsed = OverridesParser.create().parse_overrides(given.overrides)
    return [override.key_or_group for override in parsed if override.is_sweep_override()]


def job_suffix(overrides: Sequence[str], swept: Sequence[str]) -> str:
    """What tells a job from its siblings, fit for a file's name.

    >>> job_suffix(["optimizer.lr=0.1", "seed=3", "max_epochs=2"], ["optimizer.lr", "seed"])
    'lr0.1-seed3'
    """
    last = [key.rpartition(".")[2] for key in swept]
    parts = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in swept:
            short = key.rpartition(".")[2]
            parts.append(f"{short if last.count(short) == 1 else key}{value}")
    return re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(parts)).strip("_")


def _own_folder(cfg: DictConfig, suffix: str, swept: Sequence[str], given: Invocation) -> None:
    """Give a job of ``--multirun`` a name of its own, unless names were typed."""
    from omegaconf import OmegaConf

    OmegaConf.set_struct(cfg, False)
    if OmegaConf.select(cfg, "compare.dir") is not None and "compare.dir" not in swept:
        cfg.compare.dir = str(Path(cfg.compare.dir) / suffix)
    elif not any(override.lstrip("+").startswith("name=") for override in given.overrides):
        name = OmegaConf.select(cfg, "name", throw_on_missing=False)
        dataset = OmegaConf.select(cfg, "data.dataset", throw_on_missing=False)
        name = name or "-".join(str(part) for part in (cfg.get("method"), dataset) if part)
        cfg.name = f"{name}-{suffix}" if name else suffix


def _say_what_begins(given: Invocation) -> None:
    """At once: the libraries take seconds to load, and all that is known without them is said.

    Raises:
        IECLError: one line, when there is no solo-learn.
    """
    from iecl_solo.solo.host import find_version

    version, _ = find_version()
    if all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID")):
        said = f"{given.command} {given.name.partition('/')[2] or given.name}"
        print(f"{said}: solo-learn {version}, iecl-solo {__version__}, loading torch", flush=True)


def run(given: Invocation, module: str) -> int:
    """Compose the configuration and hand it to ``module.main``, or to ``module.run``.

    Args:
        given: what was typed.
        module: dotted name of the module whose ``main(cfg, given)`` does the work of one run. One
            that launches runs itself has ``run(given)``.

    Returns:
        The code to exit with.

    Raises:
        IECLError: one line for whatever is wrong with the configuration.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solo-learn and its libraries, as they are imported
        if given.answered:
            launch(given, lambda cfg: None, given.flags, given.overrides)
            return 0
        _say_what_begins(given)
        commands = importlib.import_module(module)
        from iecl_solo.train.stop import noticed

        if hasattr(commands, "run"):
            with noticed():
                return commands.run(given)
        cfg = None if given.multirun else composed(given)
    with quiet(), noticed():
        main: Callable[[Any, Invocation], None] = commands.main
        if cfg is None:
            _sweep(given, main)
        else:
            with _hydra_config(cfg):
                main(without_hydra(cfg), given)
    return 0


def _sweep(given: Invocation, main: Callable[[Any, Invocation], None]) -> None:
    swept = _swept(given)

    def job(cfg: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        from iecl_solo.train.stop import noticed

        own = list(HydraConfig.get().overrides.task)
        _own_folder(cfg, job_suffix(own, swept), swept, given)
        with quiet(), noticed():  # a launcher's worker is another process
            main(cfg, given.job(own))

    launch(given, job, given.flags, given.overrides)
