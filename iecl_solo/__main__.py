"""``python -m iecl_solo SCRIPT [arguments]``: run a script of solo-learn's with IE-CL registered.

In the manner of ``python -m coverage run``: for the scripts that Hydra does not start. Anything
that is not a Python file is a command of ``iecl-solo``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import iecl_solo.patches as patches
from iecl_solo.cli.main import main


def run_script(script: str, arguments: list[str]) -> None:
    """Run a script as if Python had been given it, with the methods registered."""
    sys.argv = [script, *arguments]
    # what Python does for a script; it is also how a checkout's own solo is found
    sys.path[0] = str(Path(script).resolve().parent)
    patches.for_script()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].endswith(".py"):
        if not Path(sys.argv[1]).is_file():
            sys.exit(f"iecl-solo: {sys.argv[1]}: no such script")
        run_script(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(main())
