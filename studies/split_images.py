"""Two folders out of one: images to train on, and others of the same training set that judge.

    python studies/split_images.py cifar10/train datasets/cifar10-10k --train 1012 --held-out 400

Defaults are chosen on held-out *training* images, so that the test set stays unseen.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def split(images: Path, to: Path, train: int, held_out: int) -> None:
    """Copy each class's first ``train`` images to ``to/train``, its last ones to ``to/held_out``.

    Raises:
        SystemExit: one line, when a class has too few, or there are images already: those of
            another split could be on both sides.
    """
    if train < 1 or held_out < 1:
        raise SystemExit(f"{train} and {held_out} images a class: at least 1 of each is needed")
    if to.exists() and any(to.iterdir()):
        raise SystemExit(f"{to}: it is not empty, give another folder")
    for folder in sorted(p for p in images.iterdir() if p.is_dir()):
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if len(files) < train + held_out:
            raise SystemExit(f"{folder}: {len(files)} images, {train} + {held_out} are asked for")
        for name, chosen in (("train", files[:train]), ("held_out", files[-held_out:])):
            (to / name / folder.name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                shutil.copy(file, to / name / folder.name / file.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", type=Path, help="a folder of <class>/<image>")
    parser.add_argument("to", type=Path, help="where to write train/ and held_out/")
    parser.add_argument("--train", type=int, default=1012, help="images a class to train on")
    parser.add_argument("--held-out", type=int, default=400, help="images a class that judge")
    args = parser.parse_args()
    split(args.images, args.to, args.train, args.held_out)
