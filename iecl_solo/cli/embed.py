"""``iecl-solo embed``: the features of any folder of images, as parquet, npy or csv."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from iecl_solo.errors import IECLError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run", help="a .ckpt file of a run, or the run's folder")
    parser.add_argument("--images", required=True, help="a folder, or a list of paths")
    parser.add_argument("--to", required=True, help="FILE.parquet, FILE.npy or FILE.csv")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time")
    parser.add_argument("--num-workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _rewrite(done: int, total: int) -> None:
    print(f"\r{done} of {total} images", end="\n" * (done == total), file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Write the file; the same command goes on where it stopped."""
    from iecl_solo.evaluate.features import check_file, embed_images, find_device
    from iecl_solo.evaluate.load import read_pretrained
    from iecl_solo.quiet import quiet
    from iecl_solo.solo.host import find_host
    from iecl_solo.train.callbacks.terminal import EachMinute

    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if (value := getattr(args, name)) < least:
            option = name.replace("_", "-")
            raise IECLError(f"--{option} {value}: a whole number from {least} up is allowed")
    to = Path(args.to)
    device = find_device(args.device)
    with quiet():
        pretrained = read_pretrained(args.run)
        check_file(to)
        count, size = embed_images(
            pretrained,
            find_host(),
            Path(args.images).expanduser(),
            to,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            device=device,
            progress=_rewrite if sys.stderr.isatty() else EachMinute("images"),
        )
    print(f"features: {to} ({count} images, {size} features each)")
    return 0
