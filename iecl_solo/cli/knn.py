"""``iecl-solo knn``: what the host's main_knn.py does, on either solo-learn, on any device."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from iecl_solo.cli.hydra_app import Invocation
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.knn import DISTANCES, extract_features, knn_accuracies
from iecl_solo.evaluate.load import load_backbone, read_pretrained
from iecl_solo.files import write_json
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import evaluation_datasets, evaluation_loader
from iecl_solo.solo.host import find_host
from iecl_solo.solo.settings import (
    FOLDER_DATASETS,
    check_images,
    check_one_of,
    check_positive_int,
    require,
)
from iecl_solo.train.run import versions


def _listed(cfg: DictConfig, key: str) -> list[Any]:
    """The values of a key that takes several; one alone is a list of one."""
    value = plain(cfg.get(key))
    values = value if isinstance(value, list) else [value]
    if not values or None in values:
        raise IECLError(f"{key}: {value!r} is not allowed, a list of at least one value is")
    cfg[key] = values
    return values


def main(cfg: DictConfig, given: Invocation) -> None:
    """Print the accuracy for every combination of k, temperature and distance; save them."""
    OmegaConf.set_struct(cfg, False)
    require(cfg, ["pretrained_feature_extractor"])
    check_positive_int(cfg, "batch_size")
    for distance in _listed(cfg, "distance_function"):
        check_one_of("distance_function", distance, DISTANCES)
    for k in _listed(cfg, "k"):
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise IECLError(f"k: {k!r} is not allowed, whole numbers from 1 up are")
    for t in _listed(cfg, "temperature"):
        if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 < t < math.inf:
            raise IECLError(f"temperature: {t!r} is not allowed, numbers above 0 are")
    if _listed(cfg, "feature_type") != ["backbone"]:
        raise IECLError(f"feature_type: {list(cfg.feature_type)} is not allowed, [backbone] is")
    host = find_host()
    pretrained = read_pretrained(cfg.pretrained_feature_extractor)
    own = {k: v for k, v in (cfg.get("data") or {}).items() if v is not None}
    data: dict[str, Any] = {**plain(pretrained.cfg.data), **own}
    for key in ("train_path", "val_path"):
        if data.get(key) is None:
            raise IECLError(f"data.{key}: no value is given, and the checkpoint has none")
        if data["dataset"] in FOLDER_DATASETS:
            check_images(f"data.{key}", data.get("format", "image_folder"), data[key])
    train_set, test_set = evaluation_datasets(
        host,
        data["dataset"],
        data["train_path"],
        data["val_path"],
        image_size=pretrained.cfg.augmentations[0].crop_size,
        data_format=data.get("format", "image_folder"),
    )
    backbone = load_backbone(pretrained, host)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = (
        extract_features(backbone, evaluation_loader(s, cfg.batch_size, cfg.num_workers), device)
        for s in (train_set, test_set)
    )
    rows = []
    for distance in cfg.distance_function:
        temperatures = cfg.temperature if distance == "cosine" else [cfg.temperature[0]]
        scores = {
            temperature: knn_accuracies(
                train, test, k=cfg.k, temperature=temperature, distance=distance, device=device
            )
            for temperature in temperatures
        }
        for k, temperature in itertools.product(cfg.k, temperatures):
            top1, top5 = scores[temperature][k]
            row = {"distance": distance, "k": k, "acc1": top1, "acc5": top5}
            if distance == "cosine":
                row["temperature"] = temperature
            rows.append(row)
            at = f", T {temperature}" if distance == "cosine" else ""
            print(f"k-NN ({distance}, k {k}{at}): top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    result = pretrained.path.parent / "knn.json"
    write_json(result, {"rows": rows, "versions": versions(host)})
    print(f"saved: {result}")
