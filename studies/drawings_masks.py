"""The dense task of the benchmark ``drawings``: each drawn pixel belongs to its image's category.

    python studies/drawings_masks.py DATA MASKS datasets/drawings-dense

DATA and MASKS hold ``<train, test>/<category>/<name>``, the masks as 1-bit PNGs, white where there
is drawing. Written are ``{train,val}/images`` and ``{train,val}/masks``, 0 for the background and
the category's number from 1 on.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


def write(images: Path, masks: Path, to: Path) -> int:
    """Images and masks as ``iecl-solo dense`` takes them; how many.

    Raises:
        SystemExit: one line, for an image without a mask.
    """
    categories = sorted(p.name for p in (images / "train").iterdir() if p.is_dir())
    count = 0
    for part, folder in (("train", "train"), ("test", "val")):
        for number, category in enumerate(categories, start=1):
            for image in sorted((images / part / category).iterdir()):
                mask = (masks / part / category / image.name).with_suffix(".png")
                if not mask.is_file():
                    raise SystemExit(f"{image}: no mask {mask}")
                for kind in ("images", "masks"):
                    (to / folder / kind / category).mkdir(parents=True, exist_ok=True)
                shutil.copy(image, to / folder / "images" / category / image.name)
                with Image.open(mask) as opened:
                    drawn = np.asarray(opened.convert("L")) > 127
                values = Image.fromarray(np.where(drawn, number, 0).astype(np.uint8))
                values.save(to / folder / "masks" / category / mask.name)
                count += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("to", type=Path)
    args = parser.parse_args()
    print(f"{write(args.images, args.masks, args.to)} images with masks in {args.to}")
