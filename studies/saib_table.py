"""Delta H of trained SAIBs, variant by variant, and what the network trained behind each became.

    python studies/saib_table.py --images cifar10/train --out saib_table

``--images`` is a folder of classes. 500 images of each class are trained on, 200 others are
measured; the test set is not touched. One SimCLR run for the baseline, for the paper's SAIB with
each setting of its two skips, for the convex one, and for the default one (inner skip) without
the terms that can cost it its gain. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from defaults import subset
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from iecl_solo.evaluate.knn import extract_features, knn_accuracy
from iecl_solo.evaluate.load import load_backbone, load_method, read_pretrained
from iecl_solo.solo.data import evaluation_datasets, evaluation_loader, pretrain_loader
from iecl_solo.solo.host import find_host
from iecl_solo.train.callbacks.entropy_monitor import MonitorConfig, measure
from iecl_solo.train.fit import pretrain

#: With matched statistics an outer skip, which scales, would do nothing.
FREE = {"match_statistics": False}
#: Name of a row: what it writes into ``iecl``. None is the host alone.
VARIANTS: dict[str, dict | None] = {
    "no IE-CL": None,
    "paper, outer skip": {"saib": {"outer_skip": True, "inner_skip": False, **FREE}},
    "paper, both skips": {"saib": {"outer_skip": True, "inner_skip": True, **FREE}},
    "paper, inner skip": {"saib": {"outer_skip": False, "inner_skip": True}},
    "paper, no skip": {"saib": {"outer_skip": False, "inner_skip": False}},
    "convex": {"saib": {"variant": "convex"}},
    "no KL": {"beta": 0},
    "no regulariser": {"eta": 0},
    "neither": {"beta": 0, "eta": 0},
}

BACKBONES = {
    "ResNet-18": ["backbone.name=resnet18", "optimizer=sgd", "optimizer.lr=0.1"],
    "ViT-tiny": [
        "backbone.name=timm/vit_tiny_patch16_224",
        "+backbone.kwargs={img_size:32,patch_size:8}",
        "optimizer.name=adamw",
        "optimizer.lr=1e-3",
        "optimizer.weight_decay=0.05",
        "~optimizer.kwargs",
    ],
}

COLUMNS = {
    "delta_h": "Delta H",
    "delta_h_stderr": "its error",
    "delta_h_contrast": "contrast",
    "delta_h_beyond_contrast": "beyond contrast",
    "patch_kl": "KL",
    "entropy_query": "H(Z')",
    "entropy_anchor": "H(Z)",
    "effective_rank": "effective rank",
}


def row(backbone: str, variant: str, args: argparse.Namespace) -> dict[str, float]:
    """Train (once), and measure on images that were not trained on."""
    iecl = VARIANTS[variant]
    images = args.out / "images"
    with initialize_config_module("iecl_solo.configs", version_base="1.3"):
        cfg = compose(
            f"pretrain/custom/{'simclr' if iecl is None else 'iecl_simclr'}",
            overrides=[
                f"data.train_path={images / 'train'}",
                "data.image_size=32",
                "data.num_workers=0",
                *BACKBONES[backbone],
                "optimizer.batch_size=128",
                "scheduler.warmup_epochs=1",
                "monitor.every_n_epochs=0",
                "precision=32-true",
                f"max_epochs={args.epochs}",
                f"checkpoint.dir={args.out / 'runs'}",
                f"seed={args.seed}",
            ],
        )
    OmegaConf.set_struct(cfg, False)
    cfg.name = f"{backbone}-{variant}-{args.seed}".replace(" ", "_").replace(",", "")
    if iecl is not None:
        cfg.iecl.update(iecl)
    host = find_host()
    pretrained = read_pretrained(pretrain(cfg).checkpoint)

    data = {
        "dataset": "custom",
        "train_path": str(images / "train"),
        "val_path": str(images / "held_out"),
    }
    sets = evaluation_datasets(host, data, image_size=32)
    network = load_backbone(pretrained, host)
    train, test = (extract_features(network, evaluation_loader(s, 256, 0)) for s in sets)
    accuracy, _ = knn_accuracy(train, test)

    held_out = pretrained.cfg.copy()
    held_out.data.train_path = str(images / "held_out")
    held_out.optimizer.batch_size = 256
    torch.manual_seed(args.seed)
    batches = islice(pretrain_loader(held_out, host), 4)
    model = load_method(pretrained, host)
    config = MonitorConfig(images=256, delta_h_images=16, probes=16, steps=30)
    measured = pd.DataFrame([measure(model, host, views, config) for _, views, _ in batches])
    values = measured.mean()
    if "delta_h" in values:  # over probes and over images: the spread of the four batches
        values["delta_h_stderr"] = measured["delta_h"].sem()
    named = {title: values.get(name, float("nan")) for name, title in COLUMNS.items()}
    return {"backbone": backbone, "SAIB": variant, **named, "k-NN %": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("saib_table"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    subset(args.images, args.out / "images", 500, 200)
    rows = []
    for backbone in args.backbones:
        for variant in args.variants:
            rows.append(row(backbone, variant, args))
            print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(args.out / f"{'-'.join(args.backbones)}.csv", index=False)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
