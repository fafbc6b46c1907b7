"""``iecl-solo digits``: the data set of the demo, real images that need no network."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", nargs="?", default="datasets/digits", help="where to write")
    parser.add_argument("--image-size", type=int, default=32, help="height and width in pixels")


def run(args: argparse.Namespace) -> int:
    """Write the digits unless they are there."""
    from iecl_solo.digits import write_digits

    print(f"digits: {write_digits(args.folder, args.image_size)}")
    return 0
