"""``iecl-solo knn``: what the host's main_knn.py does, on either solo-learn, on any device."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from iecl_solo import checks
from iecl_solo.cli.hydra_app import Invocation
from iecl_solo.devices import cuda_or_cpu
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.knn import extract_features, knn_rows
from iecl_solo.evaluate.load import load_backbone, read_pretrained
from iecl_solo.files import write_json
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import evaluation_datasets, evaluation_loader
from iecl_solo.solo.host import find_host
from iecl_solo.solo.schema import Neighbours, check_block
from iecl_solo.solo.settings import DATASETS, FOLDER_DATASETS, check_images, require
from iecl_solo.train.run import versions

_LISTS = ("k", "temperature", "distance_function", "feature_type")


def _listed(cfg: DictConfig, key: str) -> list[Any]:
    """The values of a key that takes several; one alone is a list of one."""
    value = plain(cfg.get(key))
    return value if isinstance(value, list) else [value]


def main(cfg: DictConfig, given: Invocation) -> None:
    """Print the accuracy for every combination of k, temperature and distance; save them."""
    OmegaConf.set_struct(cfg, False)
    require(cfg, ["pretrained_feature_extractor", *_LISTS, "batch_size", "num_workers"])
    check_block("", Neighbours, plain(cfg))
    for key in _LISTS:
        cfg[key] = _listed(cfg, key)
    host = find_host()
    pretrained = read_pretrained(cfg.pretrained_feature_extractor)
    own = {k: v for k, v in (cfg.get("data") or {}).items() if v is not None}
    data = {**plain(pretrained.cfg.data), **own, "num_workers": cfg.num_workers}
    checks.one_of("data.dataset", data["dataset"], DATASETS)
    for key in ("train_path", "val_path"):
        if data.get(key) is None:
            raise IECLError(f"data.{key}: no value is given, and the checkpoint has none")
        if data["dataset"] in FOLDER_DATASETS:
            check_images(f"data.{key}", data.get("format", "image_folder"), data[key])
    size = pretrained.cfg.augmentations[0].crop_size
    train_set, test_set = evaluation_datasets(host, data, image_size=size)
    backbone = load_backbone(pretrained, host)
    device = cuda_or_cpu()
    train, test = (
        extract_features(backbone, evaluation_loader(s, cfg.batch_size, cfg.num_workers), device)
        for s in (train_set, test_set)
    )
    if too_many := [k for k in cfg.k if k > len(train[0])]:
        if given.gives("k"):
            raise IECLError(f"k: {too_many[0]} is more than the {len(train[0])} training images")
        cfg.k = [k for k in cfg.k if k not in too_many] or [len(train[0])]
        print(f"k: without {too_many}, the training images are {len(train[0])}")
    rows = []
    swept = {"k": cfg.k, "temperature": cfg.temperature, "distance": cfg.distance_function}
    for row in knn_rows(train, test, **swept, device=device):
        rows.append(row)
        at = f", T {row['temperature']}" if "temperature" in row else ""
        print(
            f"k-NN ({row['distance']}, k {row['k']}{at}): top-1 {row['acc1']:.2f} %, "
            f"top-5 {row['acc5']:.2f} %"
        )
    result = pretrained.path.parent / "knn.json"
    shown = {key: data.get(key) for key in ("dataset", "train_path", "val_path", "format")}
    write_json(result, {"rows": rows, "data": shown, "versions": versions(host)})
    print(f"saved: {result}")
