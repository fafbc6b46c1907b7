"""How the defaults of ``iecl:`` were chosen: one run a setting, k-NN on held-out training images.

    python studies/defaults.py --images cifar10/train --out defaults

``--images`` is a folder of classes. 500 images of each class are trained on, 200 others judge;
the test set is not touched. A run that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from iecl_solo.evaluate.knn import extract_features, knn_accuracy
from iecl_solo.evaluate.load import load_backbone, read_pretrained
from iecl_solo.solo.data import evaluation_datasets, evaluation_loader
from iecl_solo.solo.host import find_host
from iecl_solo.train.fit import pretrain

#: Name of a setting: what it writes into the ``iecl:`` block. None is the host alone.
SETTINGS: dict[str, dict | None] = {
    "baseline": None,
    "weights 0.01": {"beta": 0.01, "lambda": 0.01, "eta": 0.01},
    "beta, lambda 0.1": {"beta": 0.1, "lambda": 0.1, "eta": 0.01},
    "no SAIB": {"beta": 0.01, "lambda": 0.01, "eta": 0.01, "placement": "none"},
    "SAIB only": {"beta": 0.0, "lambda": 0.0, "eta": 0.0},
    "outer skip on": {
        "beta": 0.01,
        "lambda": 0.01,
        "eta": 0.01,
        "saib": {"outer_skip": True, "match_statistics": False},
    },
    "eta 0": {"beta": 0.01, "lambda": 0.01, "eta": 0.0},
    "eta 0.001": {"beta": 0.01, "lambda": 0.01, "eta": 0.001},
    "lambda 0.1": {"beta": 0.01, "lambda": 0.1, "eta": 0.01},
    "statistics matched": {
        "beta": 0.01,
        "lambda": 0.01,
        "eta": 0.01,
        "saib": {"outer_skip": False, "match_statistics": True},
    },
    "convex": {"beta": 0.01, "lambda": 0.01, "eta": 0.01, "saib": {"variant": "convex"}},
}


def subset(images: Path, out: Path, train: int, held_out: int) -> None:
    """Copy each class's first images to ``out/train``, the next ones to ``out/held_out``."""
    for folder in sorted(p for p in images.iterdir() if p.is_dir()):
        files = sorted(folder.iterdir())
        for name, chosen in (
            ("train", files[:train]),
            ("held_out", files[train : train + held_out]),
        ):
            to = out / name / folder.name
            to.mkdir(parents=True, exist_ok=True)
            for file in chosen:
                if not (to / file.name).exists():
                    shutil.copy(file, to / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("defaults"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    subset(args.images, args.out / "images", 500, 200)
    host, rows = find_host(), []
    for seed in args.seeds:
        for setting in args.settings:
            block = SETTINGS[setting]
            method = "simclr" if block is None else "iecl_simclr"
            with initialize_config_module("iecl_solo.configs", version_base="1.3"):
                cfg = compose(
                    f"pretrain/custom/{method}",
                    overrides=[
                        f"data.train_path={args.out / 'images/train'}",
                        "data.image_size=32",
                        "data.num_workers=0",
                        "backbone.name=resnet18",
                        "optimizer=sgd",
                        "optimizer.batch_size=128",
                        "optimizer.lr=0.1",
                        "scheduler.warmup_epochs=1",
                        "monitor.every_n_epochs=0",
                        "precision=32-true",
                        f"max_epochs={args.epochs}",
                        f"checkpoint.dir={args.out / 'runs'}",
                        f"seed={seed}",
                        *args.overrides,
                    ],
                )
            OmegaConf.set_struct(cfg, False)
            cfg.name = f"{setting.replace(' ', '_').replace(',', '')}-{seed}"
            if block is not None:
                cfg.iecl = OmegaConf.merge(cfg.iecl, block)
            run = pretrain(cfg)
            pretrained = read_pretrained(run.checkpoint)
            data = {
                "dataset": "custom",
                "train_path": str(args.out / "images/train"),
                "val_path": str(args.out / "images/held_out"),
            }
            sets = evaluation_datasets(host, data, image_size=32)
            backbone = load_backbone(pretrained, host)
            train, test = (extract_features(backbone, evaluation_loader(s, 256, 0)) for s in sets)
            accuracy, _ = knn_accuracy(train, test)
            rows.append({"setting": setting, "seed": seed, "k-NN %": accuracy})
            print(json.dumps(rows[-1]), flush=True)
    frame = pd.DataFrame(rows).pivot_table(
        index="setting", values="k-NN %", aggfunc=["mean", "std"]
    )
    frame = frame.reindex(args.settings)
    frame.to_csv(args.out / "defaults.csv")
    print(frame.to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()
