"""How ``compare`` evaluates: fixed beforehand, the same for a method and its twin."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf


@dataclass
class KNNProtocol:
    """Weighted k-NN on the frozen backbone's features; values of the host's classifier."""

    k: int = 20
    temperature: float = 0.07
    distance: str = "cosine"


@dataclass
class LinearProtocol:
    """Linear layer on the frozen backbone: SGD, three step decays, test accuracy after the last.

    ``lr`` is for 256 images a batch, as everywhere in solo-learn.
    """

    max_epochs: int = 30
    lr: float = 1.0
    weight_decay: float = 0.0
    batch_size: int = 256


@dataclass
class EvaluationConfig:
    """The ``evaluation:`` block that ``compare`` reads; nothing in it is tuned on the test set."""

    knn: KNNProtocol = field(default_factory=KNNProtocol)
    linear: LinearProtocol = field(default_factory=LinearProtocol)


def linear_config(cfg: DictConfig, protocol: LinearProtocol, checkpoint: str) -> DictConfig:
    """A configuration in main_linear.py's schema for a finished pretraining run."""
    steps = sorted({max(1, int(protocol.max_epochs * part)) for part in (0.6, 0.8, 0.9)})
    return OmegaConf.create(
        {
            "name": "linear",
            "pretrained_feature_extractor": checkpoint,
            "pretrain_method": cfg.method,
            "backbone": cfg.backbone,
            "data": {
                "dataset": cfg.data.dataset,
                "train_path": cfg.data.train_path,
                "val_path": cfg.data.val_path,
                "format": cfg.data.format,
                "num_workers": cfg.data.num_workers,
                "augmentations": {"crop_size": cfg.augmentations[0].crop_size},
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": protocol.batch_size,
                "lr": protocol.lr,
                "weight_decay": protocol.weight_decay,
            },
            "scheduler": {"name": "step", "lr_decay_steps": steps},
            "max_epochs": protocol.max_epochs,
            "seed": cfg.seed,
            "accelerator": cfg.get("accelerator", "auto"),
            "devices": cfg.get("devices", 1),
            "precision": cfg.get("precision", "32-true"),
        }
    )
