"""A folder of classes, <class>/<image>, as tar shards for ``data.format=webdataset``.

    python examples/write_shards.py IMAGES SHARDS

The images go in a random order, so that each shard holds all classes; the files are taken as they
are. ``--size`` is how many megabytes a shard holds.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from torchvision.datasets import ImageFolder
from webdataset import ShardWriter


def write(images: str | Path, shards: str | Path, size: float = 150, seed: int = 0) -> int:
    """Write ``<shards>/000000.tar``, ...; returns how many images they hold."""
    samples = ImageFolder(images).samples
    random.Random(seed).shuffle(samples)
    Path(shards).mkdir(parents=True)
    with ShardWriter(f"{shards}/%06d.tar", maxsize=size * 1e6, maxcount=10**9, verbose=0) as writer:
        for number, (file, label) in enumerate(samples):
            ending = Path(file).suffix.lstrip(".").lower()
            data = Path(file).read_bytes()
            writer.write({"__key__": f"{number:09d}", ending: data, "cls": label})
    return len(samples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images")
    parser.add_argument("shards")
    parser.add_argument("--size", type=float, default=150, help="megabytes of a shard")
    given = parser.parse_args()
    print(write(given.images, given.shards, given.size), "images")
