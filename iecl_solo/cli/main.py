"""``iecl-solo <command>``: which module does what. Imports nothing heavy, so that help is quick."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence

from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.version import __version__

#: Commands configured by Hydra: (module, folder of their packaged configs, what they do).
HYDRA_COMMANDS = {
    "pretrain": ("pretrain", "pretrain", "pretrain a method of solo-learn, or a variant of it"),
    "compare": ("compare", "pretrain", "train a baseline and its variant, print one table"),
    "linear": ("linear", "linear", "train a linear layer on a frozen backbone"),
    "knn": ("knn", "knn", "classify by nearest neighbours in a backbone's features"),
    "benchmark": ("benchmark", "benchmark", "run a grid of methods over seeds, and report it"),
}

#: Commands with plain arguments.
PLAIN_COMMANDS = {
    "embed": ("embed", "write the features of any folder of images: parquet, npy or csv"),
    "export": ("export", "write a checkpoint's backbone, or its SAIB, as safetensors"),
    "inspect": ("inspect", "measure a finished run's entropies, and draw them"),
    "dense": ("dense", "judge a frozen feature map by a linear head's segmentation"),
    "report": ("report", "write what a benchmark's rows say: a page, Markdown, LaTeX, CSV"),
    "digits": ("digits", "write scikit-learn's digits as a folder of images"),
    "install-host": ("install_host", "install solo-learn, from the index, GitHub or a path"),
    "doctor": ("doctor", "say what is installed, what was patched and what is missing"),
    "completion": ("completion", "print what makes a shell complete these commands"),
}

COMMANDS = (*HYDRA_COMMANDS, *PLAIN_COMMANDS)

#: Where a path cannot be written or read, the system's own words are one line.
_PATHS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG),
}


def usage() -> str:
    """The text of ``iecl-solo --help``."""
    whats = {name: entry[-1] for name, entry in (HYDRA_COMMANDS | PLAIN_COMMANDS).items()}
    lines = [f"  {name:<14}{what}" for name, what in whats.items()]
    return "\n".join(
        [
            "usage: iecl-solo <command> [arguments]",
            "",
            *lines,
            "",
            "iecl-solo help <command> says more. A script of solo-learn's own runs with IE-CL",
            "registered by: python -m iecl_solo SCRIPT [arguments]",
        ]
    )


def one_line(error: Exception) -> str:
    """The error's own line; a data loader's worker wraps it in a traceback."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix("iecl_solo.errors.IECLError: ")


def _dispatch(command: str, arguments: list[str]) -> int:
    if command in HYDRA_COMMANDS:
        from iecl_solo.cli import hydra_app

        name, folder, what = HYDRA_COMMANDS[command]
        if hydra_app.asks_help(arguments):
            print(hydra_app.help_text(command, folder, what))
            return 0
        given = hydra_app.read_arguments(command, folder, arguments)
        return hydra_app.run(given, f"iecl_solo.cli.{name}")
    if command in PLAIN_COMMANDS:
        name, what = PLAIN_COMMANDS[command]
        module_object = importlib.import_module(f"iecl_solo.cli.{name}")
        parser = argparse.ArgumentParser(prog=f"iecl-solo {command}", description=what)
        module_object.add_arguments(parser)
        return module_object.run(parser.parse_args(arguments))
    raise unknown_name("command", command, COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 if it worked, 2 with one line on standard error if the input was bad."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
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
    except OSError as error:
        if error.errno not in _PATHS or error.filename is None:
            raise
        print(f"iecl-solo: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:  # by a signal, of which the training says more
        said = str(stopped) or "interrupted"
        print(f"iecl-solo: {said}; the same command goes on where it stopped", file=sys.stderr)
        return getattr(stopped, "code", 130)


if __name__ == "__main__":
    sys.exit(main())
