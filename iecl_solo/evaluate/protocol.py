"""How a pretrained backbone is evaluated: fixed beforehand, the same for baseline and variant."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iecl_solo import checks
from iecl_solo.errors import IECLError, unknown_key
from iecl_solo.evaluate.corruptions import CORRUPTIONS, SEVERITIES
from iecl_solo.evaluate.knn import DISTANCES
from iecl_solo.evaluate.transfer import names
from iecl_solo.solo.settings import DATASETS


def _check_positive(key: str, values: list[int] | list[float]) -> None:
    if not values or min(values) <= 0:
        raise IECLError(f"evaluation.{key}: {values} is not a list of positive numbers")


def _check_trained(name: str, protocol: LinearProtocol | FinetuneProtocol) -> None:
    """What linear evaluation and fine-tuning share."""
    checks.whole(f"evaluation.{name}.batch_size", protocol.batch_size, 1)
    checks.number(f"evaluation.{name}.weight_decay", protocol.weight_decay, 0)
    for lr in protocol.lr:
        checks.number(f"evaluation.{name}.lr", lr, 0, above=True)
    _check_positive(f"{name}.lr", protocol.lr)


@dataclass
class KNNProtocol:
    """Weighted k-NN on the frozen backbone's features; values of the host's classifier.

    Of several ``k`` the best on a held-out part of the *training* set is taken.
    """

    k: list[int] = field(default_factory=lambda: [20])
    temperature: float = 0.07
    distance: str = "cosine"

    def __post_init__(self) -> None:
        _check_positive("knn.k", self.k)
        checks.number("evaluation.knn.temperature", self.temperature, 0, above=True)
        checks.one_of("evaluation.knn.distance", self.distance, DISTANCES)


@dataclass
class LinearProtocol:
    """Linear layer on the frozen backbone: SGD, three step decays, test accuracy after the last.

    ``lr`` is for 256 images a batch, as everywhere in solo-learn; of several the best on a held-out
    part of the *training* set is taken. ``augment`` shows the training images cropped and flipped,
    epoch after epoch, as solo-learn's own script does; without it their features are computed once.
    ``max_epochs: 0`` leaves it out.
    """

    max_epochs: int = 30
    lr: list[float] = field(default_factory=lambda: [1.0])
    weight_decay: float = 0.0
    batch_size: int = 256
    augment: bool = True

    def __post_init__(self) -> None:
        checks.whole("evaluation.linear.max_epochs", self.max_epochs, 0)
        _check_trained("linear", self)


@dataclass
class FinetuneProtocol:
    """The whole network trained on a share of the labels; ``fractions: []`` leaves it out.

    Of several ``lr`` the best on a held-out part of those labels is taken.
    """

    fractions: list[float] = field(default_factory=list)
    max_epochs: int = 20
    lr: list[float] = field(default_factory=lambda: [0.1])
    weight_decay: float = 0.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for share in self.fractions:
            checks.number("evaluation.finetune.fractions", share, 0, 1, above=True)
        checks.whole("evaluation.finetune.max_epochs", self.max_epochs, 1)
        _check_trained("finetune", self)


#: What can be measured beside the accuracies, by ``evaluation.measures``.
MEASURES = ("label_free", "retrieval", "corruptions", "dense_miou")


@dataclass
class LabelFreeProtocol:
    """RankMe, LiDAR, alpha-ReQ, uniformity, alignment: for runs without labels, and on request.

    The first ``rank_images`` images are shown as evaluation shows them; of ``images`` of them
    ``views`` augmented views are drawn by the run's own augmentations.
    """

    rank_images: int = 10_000
    images: int = 256
    views: int = 8

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            checks.whole(f"evaluation.label_free.{name}", count, 2)


@dataclass
class RetrievalProtocol:
    """recall@k by labels; with a ``pattern`` also of the same object from another source.

    ``pattern`` is a regular expression that names an ``object``, and optionally a ``source``, in
    each test image's path below the test folder: ``(?P<source>[^/]+)/(?P<object>[^/]+)[.]png``.
    """

    k: list[int] = field(default_factory=lambda: [1, 5, 10])
    pattern: str | None = None

    def __post_init__(self) -> None:
        _check_positive("retrieval.k", self.k)
        if self.pattern is None:
            return
        try:
            expression = re.compile(self.pattern)
        except re.error as error:
            raise IECLError(
                f"evaluation.retrieval.pattern: no regular expression: {error}"
            ) from None
        if "object" not in expression.groupindex:
            given = self.pattern
            raise IECLError(f"evaluation.retrieval.pattern: {given}: no group (?P<object>...)")


@dataclass
class CorruptionProtocol:
    """k-NN and probe, trained on clean images, on corrupted test images.

    The mean is over ``corruptions`` (all 15 if empty) and ``severities``, each on the same
    ``images`` of the test set.
    """

    corruptions: list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=lambda: list(SEVERITIES))
    images: int = 1000

    def __post_init__(self) -> None:
        for name in self.corruptions:
            checks.one_of("evaluation.corruptions.corruptions", name, CORRUPTIONS)
        if not self.severities or not set(self.severities) <= set(SEVERITIES):
            raise IECLError(
                f"evaluation.corruptions.severities: {self.severities} is not out of 1 to 5"
            )
        checks.whole("evaluation.corruptions.images", self.images, 1)


#: torchvision's segmentation data sets that are taken by name.
SEGMENTATION = ("VOCSegmentation", "OxfordIIITPet")


@dataclass
class DenseProtocol:
    """The ``dense:`` block: where images and masks are, and how the head is trained.

    Attributes:
        root: a folder with ``{train,val}/images`` and ``{train,val}/masks``; a mask is a PNG named
            as its image, each pixel a class, 255 for none. With ``torchvision`` its data folder.
        torchvision: VOCSegmentation or OxfordIIITPet, instead of folders of one's own.
        size: height and width at which images are shown; the run's own if not given.
        max_epochs: of the head.
        lr: of Adam, falling to 0 by a cosine.
        batch_size: images of a step.
    """

    root: str | None = None
    torchvision: str | None = None
    size: int | None = None
    max_epochs: int = 30
    lr: float = 1e-2
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.torchvision is not None:
            checks.one_of("dense.torchvision", self.torchvision, SEGMENTATION)
        for name in ("size", "max_epochs", "batch_size", "lr"):
            value = getattr(self, name)
            if value is not None:
                checks.number(f"dense.{name}", value, 0, above=True)


@dataclass
class EvaluationConfig:
    """The ``evaluation:`` block; nothing in it is chosen on the evaluation split.

    Attributes:
        knn: weighted k-NN.
        linear: linear evaluation.
        finetune: fine-tuning on few labels.
        held_out: share of the training set that chooses, where there is something to choose.
        datasets: other data sets by name, for transfer: ``dataset``, ``train_path``, ``val_path``,
            or ``torchvision``, the name of one of its classes, and ``root``, where it is on disk.
        measures: what else to measure, out of ``MEASURES``.
        label_free: what needs no labels.
        retrieval: recall@k.
        corruptions: the 15 corruptions of ImageNet-C.
        dense: mIoU of a linear head on the feature map.
    """

    knn: KNNProtocol = field(default_factory=KNNProtocol)
    linear: LinearProtocol = field(default_factory=LinearProtocol)
    finetune: FinetuneProtocol = field(default_factory=FinetuneProtocol)
    held_out: float = 0.1
    datasets: dict[str, Any] = field(default_factory=dict)
    measures: list[str] = field(default_factory=list)
    label_free: LabelFreeProtocol = field(default_factory=LabelFreeProtocol)
    retrieval: RetrievalProtocol = field(default_factory=RetrievalProtocol)
    corruptions: CorruptionProtocol = field(default_factory=CorruptionProtocol)
    dense: DenseProtocol = field(default_factory=DenseProtocol)

    def __post_init__(self) -> None:
        for name in self.measures:
            checks.one_of("evaluation.measures", name, MEASURES)
        if "dense_miou" in self.measures and self.dense.root is None:
            raise IECLError("evaluation.dense.root: no value is given, dense_miou needs one")
        checks.number("evaluation.held_out", self.held_out, 0, 0.99, above=True)
        for name, data in self.datasets.items():
            if not isinstance(data, dict):
                raise checks.refusal(f"evaluation.datasets.{name}", data, "a block of keys")
            own = f"evaluation.datasets.{name}"
            known = "torchvision" in data
            wanted = ("torchvision", "root") if known else ("dataset", "train_path", "val_path")
            allowed = wanted if known else (*wanted, "format")
            if unknown := [key for key in data if key not in allowed]:
                raise unknown_key(f"{own}.", unknown[0], allowed)
            if missing := [key for key in wanted if data.get(key) is None]:
                raise IECLError(f"{own}: {missing} missing")
            if known:
                checks.one_of(f"{own}.torchvision", data["torchvision"], names())
            else:
                checks.one_of(f"{own}.dataset", data["dataset"], DATASETS)


def decay_epochs(max_epochs: int) -> list[int]:
    """The epochs after which a linear layer's learning rate falls to a tenth.

    Example:
        >>> decay_epochs(30), decay_epochs(2)
        ([18, 24, 27], [1])
    """
    return sorted({max(1, int(max_epochs * part)) for part in (0.6, 0.8, 0.9)})


def linear_config(
    cfg: DictConfig,
    data: dict[str, Any],
    protocol: LinearProtocol | FinetuneProtocol,
    checkpoint: str,
) -> DictConfig:
    """A configuration in main_linear.py's schema for a finished pretraining run.

    Args:
        cfg: of the pretraining run.
        data: dataset, train_path, val_path and format.
        protocol: linear evaluation, or fine-tuning.
        checkpoint: of the pretraining run.
    """
    steps = decay_epochs(protocol.max_epochs)
    finetune = isinstance(protocol, FinetuneProtocol)
    return OmegaConf.create(
        {
            "name": "finetune" if finetune else "linear",
            "pretrained_feature_extractor": checkpoint,
            "pretrain_method": cfg.method,
            "finetune": finetune,
            "backbone": cfg.backbone,
            "data": {
                **data,
                "num_workers": cfg.data.num_workers,
                "augmentations": {"crop_size": cfg.augmentations[0].crop_size},
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": protocol.batch_size,
                "lr": protocol.lr[0],
                "weight_decay": protocol.weight_decay,
            },
            "scheduler": {"name": "step", "lr_decay_steps": steps},
            "max_epochs": protocol.max_epochs,
            "seed": cfg.seed,
            "accelerator": cfg.get("accelerator", "auto"),
            "devices": 1,  # however many the run was trained on, it is judged the same
            "precision": cfg.get("precision", "32-true"),
        }
    )
