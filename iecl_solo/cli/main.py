"""``iecl-solo <command>``: which module does what. Imports nothing heavy, so that help is quick."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.version import __version__

#: Commands configured by Hydra: (module, folder of their packaged configs, what they do).
HYDRA_COMMANDS = {
    "pretrain": ("pretrain", "pretrain", "pretrain a method of solo-learn, or a twin of it"),
    "compare": ("compare", "pretrain", "train a method and its twin, print one table"),
    "linear": ("linear", "linear", "train a linear layer on a frozen backbone"),
    "knn": ("knn", "knn", "classify by nearest neighbours in a backbone's features"),
}

#: Grids of runs: Hydra's jobs are their cells.
BENCHMARK = {"benchmark": ("run a grid of them over seeds; one store, one report",)}

#: Commands with plain arguments.
PLAIN_COMMANDS = {
    "export": ("export", "write a checkpoint's backbone, or its SAIB, as safetensors"),
    "inspect": ("inspect", "measure a finished run's entropies, and draw them"),
    "dense": ("dense", "judge a frozen feature map by a linear head's segmentation"),
    "report": ("report", "write what a benchmark's rows say: a page, Markdown, LaTeX, CSV"),
    "digits": ("digits", "write scikit-learn's digits as a folder of images"),
    "install-host": ("install_host", "install solo-learn, from the index, GitHub or a path"),
    "doctor": ("doctor", "say what is installed, what was patched and what is missing"),
}


def usage() -> str:
    """The text of ``iecl-solo --help``."""
    commands = {
        name: entry[-1] for name, entry in (HYDRA_COMMANDS | BENCHMARK | PLAIN_COMMANDS).items()
    }
    lines = [f"  {name:<14}{what}" for name, what in commands.items()]
    return "\n".join(
        [
            "usage: iecl-solo <command> [arguments]",
            "",
            *lines,
            "",
            "iecl-solo <command> --help says more. A script of solo-learn's own runs with IE-CL",
            "registered by: python -m iecl_solo SCRIPT [arguments]",
        ]
    )


def one_line(error: IECLError) -> str:
    """The error's own line; a data loader's worker wraps it in a traceback."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix("iecl_solo.errors.IECLError: ")


def _dispatch(command: str, arguments: list[str]) -> int:
    if command in HYDRA_COMMANDS:
        from iecl_solo.cli.hydra_app import run

        module, folder, what = HYDRA_COMMANDS[command]
        return run(command, f"iecl_solo.cli.{module}", folder, what, arguments)
    if command in BENCHMARK:
        from iecl_solo.cli.benchmark import run as run_benchmark

        return run_benchmark(arguments)
    if command in PLAIN_COMMANDS:
        name, what = PLAIN_COMMANDS[command]
        module_object = importlib.import_module(f"iecl_solo.cli.{name}")
        parser = argparse.ArgumentParser(prog=f"iecl-solo {command}", description=what)
        module_object.add_arguments(parser)
        return module_object.run(parser.parse_args(arguments))
    raise unknown_name("command", command, [*HYDRA_COMMANDS, *BENCHMARK, *PLAIN_COMMANDS])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 if it worked, 2 with one line on standard error if the input was bad."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"iecl-solo {__version__}")
        return 0
    try:
        return _dispatch(arguments[0], arguments[1:])
    except IECLError as error:
        print(f"iecl-solo: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("iecl-solo: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
