"""Run a command as a Hydra application: packaged configs by name, one line for what is wrong."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path

from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.quiet import quiet
from iecl_solo.train.compose import PACKAGED, check_packaged, optional, packaged_configs

# a run keeps its own record; Hydra's would be written even for a run that is refused
_NO_FILES = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


def _help(command: str, folder: str, what: str) -> str:
    names = packaged_configs(folder)
    return "\n".join(
        [
            f"usage: iecl-solo {command} --config-name NAME [KEY=VALUE ...]",
            "",
            f"{what[0].upper()}{what[1:]}.",
            "",
            "  --config-name NAME   one of the packaged configurations below",
            "  --config-path DIR    take NAME from your own folder, relative to where you stand",
            "  KEY=VALUE            override any key, e.g. optimizer.batch_size=128 iecl.beta=0.1",
            "  --cfg job            print the composed configuration and stop",
            "  --multirun           one run for each combination of KEY=A,B,C",
            "",
            "packaged configurations:",
            *(f"  {name}" for name in names),
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


def _source(command: str, folder: str, arguments: list[str]) -> tuple[str, str, list[str]]:
    """Config path, config name and the arguments left for Hydra."""
    name, rest = _take(arguments, "--config-name", "-cn")
    path, rest = _take(rest, "--config-path", "-cp")
    if name is None:
        raise IECLError(
            f"{command}: --config-name is missing; iecl-solo {command} --help lists the names"
        )
    name = name.removesuffix(".yaml")
    if path is None or path == PACKAGED:
        name = name.removeprefix(f"{folder}/")
        check_packaged(folder, name)
        return PACKAGED, f"{folder}/{name}", rest
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise IECLError(f"--config-path {path}: no such folder")
    if not (root / f"{name}.yaml").is_file():
        own = [p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")]
        raise unknown_name(f"config in {path}", name, own)
    return str(root), name, rest


def _explain(error: Exception) -> IECLError:
    """Hydra's own errors in one line, with the nearest key where one was misspelt."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    key = getattr(cause, "key", None)
    parent = getattr(cause, "parent_node", None)
    if key is not None and parent is not None:
        near = difflib.get_close_matches(str(key), [str(k) for k in parent], 1, 0.5)
        text = f"unknown key {cause.full_key}"  # type: ignore[attr-defined]
        text += f": did you mean '{near[0]}'?" if near else ": use +KEY=VALUE to add a new one"
    return IECLError(text.partition(" full_key:")[0])


def run(command: str, module: str, folder: str, what: str, arguments: list[str]) -> int:
    """Compose the configuration that ``arguments`` name and hand it to ``module.main``.

    Args:
        command: the command's name, for messages.
        module: dotted name of the module whose ``main(cfg)`` does the work.
        folder: folder of the packaged configs.
        what: what the command does, for its help.
        arguments: of the command line, after the command.

    Raises:
        IECLError: one line for whatever is wrong with the configuration.
    """
    if "--help" in arguments or "-h" in arguments:
        print(_help(command, folder, what))
        return 0
    path, name, rest = _source(command, folder, arguments)

    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    quiet()
    failed: list[IECLError] = []

    def task(cfg: DictConfig) -> None:
        try:
            importlib.import_module(module).main(cfg)
        except IECLError as error:
            # not through Hydra, which would print lines of its own
            failed.append(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the error can be told in one line
    given = sys.argv
    # flags first: argparse takes its positional arguments in one piece
    flags = [a for a in rest if a in ("--multirun", "-m")]
    overrides = [a for a in rest if a not in flags]
    sys.argv = [f"iecl-solo {command}", *flags, *_NO_FILES]
    sys.argv += optional(overrides)
    try:
        hydra.main(version_base="1.3", config_path=path, config_name=name)(task)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _explain(error) from None
    finally:
        sys.argv = given
    if failed:
        raise failed[0]
    return 0
