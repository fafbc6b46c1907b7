"""Every evaluation of a finished run, once: its measures by name."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from iecl_solo.decoded import undecodable
from iecl_solo.devices import cuda_or_cpu
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.corruptions import CORRUPTIONS, corrupted, find_library
from iecl_solo.evaluate.dense import dense_miou, masked_sets, square
from iecl_solo.evaluate.features import Images
from iecl_solo.evaluate.gallery import VIEWS, changed_views, make_gallery, to_pixels
from iecl_solo.evaluate.knn import extract_features, knn_accuracies, knn_accuracy
from iecl_solo.evaluate.label_free import label_free
from iecl_solo.evaluate.linear import linear_accuracy
from iecl_solo.evaluate.load import (
    Pretrained,
    first_views,
    load_backbone,
    load_method,
    read_pretrained,
)
from iecl_solo.evaluate.probe import Probes, fit_probes
from iecl_solo.evaluate.protocol import (
    DenseProtocol,
    EvaluationConfig,
    KNNProtocol,
    decay_epochs,
    linear_config,
)
from iecl_solo.evaluate.retrieval import groups_by_name, recall_at_k
from iecl_solo.evaluate.transfer import augmenting, torchvision_sets
from iecl_solo.files import read_json, write_json
from iecl_solo.images import image_files
from iecl_solo.order import SeededViews
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import (
    evaluation_datasets,
    evaluation_loader,
    evaluation_transform,
    pretrain_loader,
)
from iecl_solo.solo.embed import query_entropy
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.settings import (
    FOLDER_DATASETS,
    check_images,
    prepare_linear,
    sources,
    without_labels,
)
from iecl_solo.solo.shards import FORMATS, open_shards
from iecl_solo.solo.wrapper import objectives
from iecl_solo.train.callbacks.terminal import EachMinute
from iecl_solo.train.fit import trainer_arguments
from iecl_solo.train.logs import read_monitor
from iecl_solo.train.run import Run, versions

EVALUATION = "evaluation.json"
_NO_EPOCH = 10**9
Labelled = tuple[Tensor, Tensor]


def check_evaluation(protocol: EvaluationConfig) -> None:
    """Refuse an evaluation that would fail after the training, before it.

    Raises:
        IECLError: one line, for folders, masks or classes that are not there, a package that is
            missing, or what the host cannot do.
    """
    host = find_host()
    if protocol.finetune.fractions and not host.finetunes:
        raise IECLError(
            f"evaluation.finetune: {host.describe()} only trains the last layer; solo-learn's "
            "GitHub main fine-tunes, evaluation.finetune.fractions=[] leaves it out"
        )
    for name, data in protocol.datasets.items():
        where = f"evaluation.datasets.{name}"
        if data.get("dataset") in FOLDER_DATASETS:
            for key in ("train_path", "val_path"):
                check_images(f"{where}.{key}", data.get("format", "image_folder"), data[key])
            evaluation_datasets(host, data, image_size=32)  # which compares their classes
        elif "torchvision" in data:
            shown = evaluation_transform(host, "custom", 32)
            torchvision_sets(data["torchvision"], data["root"], shown, shown)
    if "corruptions" in protocol.measures:
        find_library()
    if "dense_miou" in protocol.measures:
        masked_sets(protocol.dense, None, 1)


def split(labels: Tensor, share: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of a stratified share of ``labels`` (N,), and of the rest; at least one a class."""
    classes, counts = np.unique(labels.numpy(), return_counts=True)
    size = min(max(round(share * len(labels)), len(classes)), len(labels) - len(classes))
    if counts.min() < 2 or size < len(classes):  # too few to be stratified
        order = np.random.default_rng(seed).permutation(len(labels))
        size = max(1, round(share * len(labels)))
        return order[:size].tolist(), order[size:].tolist()
    rest, chosen = train_test_split(
        np.arange(len(labels)), test_size=size, random_state=seed, stratify=labels.numpy()
    )
    return chosen.tolist(), rest.tolist()


def _at(data: Labelled, indices: Sequence[int]) -> Labelled:
    return data[0][indices], data[1][indices]


def _knn(
    train: Labelled, test: Labelled, protocol: KNNProtocol, held_out: float
) -> dict[str, float]:
    options: dict[str, Any] = {
        "temperature": protocol.temperature,
        "distance": protocol.distance,
        "device": cuda_or_cpu(),
    }
    best = protocol.k[0]
    if len(protocol.k) > 1:
        chosen, rest = split(train[1], held_out, 0)
        scores = knn_accuracies(_at(train, rest), _at(train, chosen), k=protocol.k, **options)
        best = max(scores, key=lambda k: scores[k][0])
    top1, top5 = knn_accuracy(train, test, k=best, **options)
    return {"knn_acc1": top1, "knn_acc5": top5, "knn_k": best}


def own_data(cfg: DictConfig) -> dict[str, Any]:
    """The data set that a configuration names, of a pretraining or of a linear evaluation."""
    return {name: cfg.data[name] for name in ("dataset", "train_path", "val_path", "format")}


class _Evaluation:
    """One run's backbone on one labelled data set; ``name`` is empty for the run's own."""

    def __init__(
        self,
        pretrained: Pretrained,
        host: Host,
        protocol: EvaluationConfig,
        data: dict[str, Any],
        name: str = "",
    ) -> None:
        self.pretrained, self.host, self.protocol, self.data = pretrained, host, protocol, data
        self.name = name
        self.cfg = pretrained.cfg
        self.backbone = load_backbone(pretrained, host)
        plain_train, self.test_set = self._datasets(augment=False)
        self.train, self.test = (self._features(s) for s in (plain_train, self.test_set))
        self.classes = int(torch.cat([self.train[1], self.test[1]]).max()) + 1

    def _datasets(self, *, augment: bool) -> tuple[Any, Any]:
        size = self.cfg.augmentations[0].crop_size
        if "torchvision" in self.data:
            shown = evaluation_transform(self.host, self.cfg.data.dataset, size)
            for_train = augmenting(shown, size) if augment else shown
            return torchvision_sets(self.data["torchvision"], self.data["root"], for_train, shown)
        # how files are read is the run's affair, also those of another data set
        run = {key: self.cfg.data.get(key) for key in ("on_error", "num_workers")}
        data = {**self.data, **run}
        return evaluation_datasets(self.host, data, image_size=size, augment=augment)

    def _features(self, dataset: Any) -> Labelled:
        loader = evaluation_loader(dataset, 256, self.cfg.data.num_workers)
        batches = EachMinute(f"{self.cfg.name}  batches for their features").over(loader)
        return extract_features(self.backbone, batches, cuda_or_cpu())

    def _config(self, protocol: Any) -> tuple[DictConfig, dict[str, Any]]:
        known = "torchvision" in self.data  # which the host cannot count the classes of
        data = own_data(self.cfg) if known else self.data
        linear = linear_config(self.cfg, data, protocol, str(self.pretrained.path))
        linear = prepare_linear(linear, self.host)
        if known:
            linear.data.num_classes = self.classes
        arguments = trainer_arguments(linear) | {
            "logger": False,
            "enable_progress_bar": False,
            "check_val_every_n_epoch": linear.max_epochs,  # only the last one counts
        }
        return linear, arguments

    def _host_accuracy(
        self,
        backbone: nn.Module,
        train: Dataset,
        test: Dataset,
        linear: DictConfig,
        arguments: dict[str, Any],
    ) -> tuple[float, float]:
        """``linear_accuracy``, with a line a minute."""
        pulse = EachMinute(f"{self.cfg.name}  epochs")

        def tell_epoch(trainer: Trainer, module: LightningModule) -> None:
            pulse(trainer.current_epoch + 1, linear.max_epochs)

        callbacks: list[Callback] = [LambdaCallback(on_train_epoch_end=tell_epoch)]
        return linear_accuracy(
            linear, backbone, self.host, train, test, arguments, callbacks=callbacks
        )

    def _probes(self, rates: Sequence[float], train: Labelled) -> Probes:
        """One linear layer a rate, all trained together on features."""
        protocol = self.protocol.linear
        return fit_probes(
            *train,
            [rate * protocol.batch_size / 256 for rate in rates],
            classes=self.classes,
            max_epochs=protocol.max_epochs,
            decay_epochs=decay_epochs(protocol.max_epochs),
            batch_size=protocol.batch_size,
            weight_decay=protocol.weight_decay,
            seed=self.cfg.seed,
            device=cuda_or_cpu(),
        )

    def _on_features(
        self, rates: Sequence[float], train: Labelled, test: Labelled
    ) -> list[tuple[float, float]]:
        return self._probes(rates, train).accuracies(*test)

    def knn(self) -> dict[str, float]:
        return _knn(self.train, self.test, self.protocol.knn, self.protocol.held_out)

    def choose_lr(self) -> float:
        protocol = self.protocol.linear
        if len(protocol.lr) == 1:
            return protocol.lr[0]
        chosen, rest = split(self.train[1], self.protocol.held_out, 0)
        parts = _at(self.train, rest), _at(self.train, chosen)
        scores = [top1 for top1, _ in self._on_features(protocol.lr, *parts)]
        # one that diverged has no score
        return max(zip(scores, protocol.lr, strict=True), key=lambda s: (s[0] == s[0], s[0]))[1]

    def linear(self) -> dict[str, float]:
        protocol, best = self.protocol.linear, self.choose_lr()
        if protocol.augment:
            linear, arguments = self._config(protocol)
            linear.optimizer.lr *= best / protocol.lr[0]
            sets = self._datasets(augment=True)
            top = self._host_accuracy(self.backbone, *sets, linear, arguments)
        else:
            (top,) = self._on_features([best], self.train, self.test)
        return {"linear_acc1": top[0], "linear_acc5": top[1], "linear_lr": best}

    def retrieval(self) -> dict[str, float]:
        """recall@k among the test images, by label, and of objects where a pattern is given."""
        protocol, (features, labels) = self.protocol.retrieval, self.test
        by_label = recall_at_k(features, labels, protocol.k, device=cuda_or_cpu())
        found = {f"recall_at_{k}": value for k, value in by_label.items()}
        if protocol.pattern is not None:
            files = file_names(self.test_set, self.data["val_path"])
            objects, sources = groups_by_name(files, protocol.pattern)
            same = recall_at_k(features, objects, protocol.k, sources=sources, device=cuda_or_cpu())
            found |= {f"same_object_recall_at_{k}": value for k, value in same.items()}
        return found

    def corruptions(self, k: int) -> dict[str, float]:
        """Accuracies on corrupted test images: means over severities, and over all.

        Args:
            k: of the k-NN, as chosen on clean images.
        """
        find_library()
        protocol, linear = self.protocol.corruptions, self.protocol.linear
        probes = self._probes([self.choose_lr()], self.train) if linear.max_epochs else None
        rows = np.linspace(0, len(self.test[1]) - 1, min(protocol.images, len(self.test[1])))
        rows = rows.astype(int).tolist()
        options: dict[str, Any] = {
            "temperature": self.protocol.knn.temperature,
            "distance": self.protocol.knn.distance,
            "device": cuda_or_cpu(),
        }
        names = protocol.corruptions or list(CORRUPTIONS)
        found: dict[str, list[float]] = {}
        pulse = EachMinute(f"{self.cfg.name}  corruptions")
        for name, severity in pulse.over(list(itertools.product(names, protocol.severities))):
            shown = self._features(Subset(corrupted(self.test_set, name, severity), rows))
            scores = {"knn_acc1": knn_accuracy(self.train, shown, k=k, **options)[0]}
            if probes is not None:
                scores["linear_acc1"] = probes.accuracies(*shown)[0][0]
            for measure, value in scores.items():
                found.setdefault(f"{measure}/corrupted", []).append(value)
                found.setdefault(f"{measure}/corrupted: {name}", []).append(value)
        return {measure: sum(values) / len(values) for measure, values in found.items()}

    def finetune(self, fraction: float) -> float:
        rates, labels = self.protocol.finetune.lr, self.train[1]
        few: Sequence[int] = range(len(labels))
        if fraction < 1:
            few, _ = split(labels, fraction, self.cfg.seed)
        best = rates[0]
        if len(rates) > 1:
            chosen, rest = split(labels[list(few)], self.protocol.held_out, 0)
            shown = self._datasets(augment=False)[0]
            judged = Subset(shown, [few[i] for i in chosen])
            own = [few[i] for i in rest]
            scores = {rate: self._finetuned(rate, own, judged) for rate in rates}
            best = max(scores, key=scores.__getitem__)
        return self._finetuned(best, few, self.test_set)

    def measures(self) -> dict[str, float]:
        """Everything that the protocol asks for on any data set; ``corruptions`` is apart."""
        protocol, about = self.protocol, f"{self.cfg.name}  {{}} {self.name}"
        found = self.knn()
        if "retrieval" in protocol.measures:
            found |= self.retrieval()
        if protocol.linear.max_epochs:
            print(about.format("linear evaluation").rstrip(), flush=True)
            found |= self.linear()
        for fraction in protocol.finetune.fractions:
            print(about.format(f"fine-tuning on {fraction:.0%}").rstrip(), flush=True)
            found[f"finetune_{100 * fraction:g}_acc1"] = self.finetune(fraction)
        if self.classes <= 5:  # it would be 100 %
            found = {k: v for k, v in found.items() if not k.endswith("_acc5")}
        return {f"{k}/{self.name}" if self.name else k: v for k, v in found.items()}

    def _finetuned(self, rate: float, rows: Sequence[int], test: Dataset) -> float:
        """Accuracy on a test set after training on some rows of the training set."""
        linear, arguments = self._config(self.protocol.finetune)
        linear.optimizer.lr *= rate / self.protocol.finetune.lr[0]
        rows = list(rows)
        if len(rows) > 1 and len(rows) % self.protocol.finetune.batch_size == 1:
            rows = rows[:-1]  # batch norm cannot train on a batch of one image
        train = Subset(self._datasets(augment=True)[0], rows)
        backbone = load_backbone(self.pretrained, self.host)  # it is changed
        return self._host_accuracy(backbone, train, test, linear, arguments)[0]


def file_names(dataset: Any, root: str) -> list[str]:
    """The images' paths of a folder of images, below its root.

    Raises:
        IECLError: for a data set that is not one of files.
    """
    if not hasattr(dataset, "samples"):
        raise IECLError("evaluation.retrieval.pattern: the data set is no folder of images")
    return [os.path.relpath(path, root) for path, _ in dataset.samples]


def _unlabelled(cfg: DictConfig, host: Host, most: int) -> Images:
    """The run's training images, at most so many, from all over the folder."""
    shown = evaluation_transform(host, cfg.data.dataset, cfg.augmentations[0].crop_size)
    if cfg.data.get("format") in FORMATS:
        shards = open_shards(cfg.data.format, str(cfg.data.train_path))
        count = len(shards.labels)
        return Images(range(count)[:: max(1, count // most)][:most], shown, shards.read)
    files = image_files(*sources(cfg.data.train_path))
    if cfg.data.get("on_error") == "skip":
        root = Path(sources(cfg.data.train_path)[0])
        broken = undecodable(files, root, cfg.data.num_workers)
        files = [file for file in files if file not in broken]
    return Images(files[:: max(1, len(files) // most)][:most], shown)


@torch.inference_mode()
def _features_of(backbone: nn.Module, images: Images, num_workers: int) -> Tensor:
    backbone = backbone.to(cuda_or_cpu()).eval()
    loader = DataLoader(images, 256, num_workers=num_workers)
    return torch.cat([backbone(x.to(cuda_or_cpu())).float().cpu() for x in loader])


def view_features(
    cfg: DictConfig, host: Host, backbone: nn.Module, images: int, views: int
) -> Tensor:
    """Features (images, views, d) of augmented views, as pretraining makes them; seeded.

    Args:
        cfg: the run's completed configuration, whose training images and augmentations are taken.
        host: the solo-learn in use.
        backbone: (B, 3, H, W) to (B, d), in eval mode.
        images: how many images, from all over the data set.
        views: large crops of each.
    """
    cfg = copy.deepcopy(cfg)
    cfg.data.views = None  # one image at a time: these are few
    loader: Any = pretrain_loader(cfg, host)
    dataset = loader.dataset
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int).tolist()
    large = cfg.data.num_large_crops
    found: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        while len(found) < views:
            # in the place of an epoch, one that no training comes to
            places: Any = [(_NO_EPOCH + len(found), i) for i in chosen]
            batches = DataLoader(SeededViews(dataset, cfg.seed), 128, sampler=places)
            crops = [crops[:large] for _, crops, _ in batches]
            for view in range(large):
                parts = [backbone(batch[view].to(cuda_or_cpu())).float().cpu() for batch in crops]
                found.append(torch.cat(parts))
    return torch.stack(found[:views], 1)


def _picture(dataset: Any) -> Callable[[int], np.ndarray]:
    """An image of an evaluation set as pixels: its normalisation, if it has one, undone."""
    steps = getattr(getattr(dataset, "transform", None), "transforms", [])
    normalize = next((s for s in steps if isinstance(s, transforms.Normalize)), None)

    def picture(i: int) -> np.ndarray:
        shown = dataset[i]
        x = (shown if isinstance(shown, Tensor) else shown[0])[None]
        if normalize is None:
            return to_pixels(x, x.min(), x.max() + 1e-6)[0]
        mean, std = (torch.as_tensor(v)[:, None, None] for v in (normalize.mean, normalize.std))
        return to_pixels(x * std + mean)[0]

    return picture


def _changed(
    model: LightningModule, cfg: DictConfig, host: Host
) -> tuple[np.ndarray, np.ndarray] | None:
    """Views of the last epoch before and after the objectives' transforms, if they have any."""
    views = first_views(cfg, host, max(0, cfg.max_epochs - 1))
    with torch.no_grad():
        for objective in objectives(model.cpu().eval()).values():
            query = objective.views.query[0]
            view = views[query][:VIEWS].float()
            after = objective.transform(view, query, "online")
            if not torch.equal(after, view):
                return changed_views(view, after)
    return None


def _measured(run: Run) -> dict[str, float]:
    """What the run itself says of its end: online accuracy, cost, entropies."""
    result = run.result
    assert result is not None
    out = {
        name: float(result[name])
        for name in ("seconds_per_step", "peak_memory_bytes", "parameters", "trained_parameters")
    }
    if "val_acc1" in result["metrics"]:
        out["online_acc1"] = result["metrics"]["val_acc1"]
    monitor = read_monitor(run.folder)
    if len(monitor):
        out |= {str(name): float(v) for name, v in monitor.iloc[-1].dropna().items()}
    return out


def _label_free(
    cfg: DictConfig, host: Host, backbone: nn.Module, features: Tensor, protocol: EvaluationConfig
) -> dict[str, float]:
    wanted = protocol.label_free
    views = view_features(cfg, host, backbone, wanted.images, wanted.views)
    return label_free(features, views)


def choose_lr(
    pretrained: Pretrained, host: Host, protocol: EvaluationConfig, data: dict[str, Any]
) -> float:
    """The learning rate of ``protocol.linear.lr`` that is best on a held-out part of train.

    Args:
        pretrained: the checkpoint.
        host: the solo-learn in use.
        protocol: of it ``linear`` and ``held_out`` count.
        data: dataset, train_path, val_path and format; nothing is chosen on ``val_path``.
    """
    return _Evaluation(pretrained, host, protocol, data).choose_lr()


def dense(pretrained: Pretrained, host: Host, protocol: DenseProtocol) -> float:
    """mIoU in per cent of a linear head on a checkpoint's frozen feature map.

    Args:
        pretrained: the checkpoint.
        host: the solo-learn in use.
        protocol: images and masks, and how the head is trained.

    Raises:
        IECLError: one line, for images or masks that are missing, or a map of one place.
    """
    cfg = pretrained.cfg
    size = protocol.size or cfg.augmentations[0].crop_size
    shown = square(evaluation_transform(host, cfg.data.dataset, size), size)
    sets = masked_sets(protocol, shown, size)
    backbone = load_backbone(pretrained, host)
    pulse = EachMinute(f"{cfg.name}  epochs of the dense probe")
    return dense_miou(
        backbone, *sets, protocol, seed=cfg.seed, device=cuda_or_cpu(), progress=pulse
    )


def _dense_where_asked(
    pretrained: Pretrained, host: Host, protocol: EvaluationConfig
) -> dict[str, float]:
    if "dense_miou" not in protocol.measures:
        return {}
    print(f"{pretrained.cfg.name}  dense probe", flush=True)
    return {"dense_miou": dense(pretrained, host, protocol.dense)}


def evaluate_on(
    pretrained: Pretrained, host: Host, protocol: EvaluationConfig, data: dict[str, Any]
) -> dict[str, float]:
    """What ``evaluate`` measures on a run's own data set, on another one; nothing is kept.

    Args:
        pretrained: the checkpoint.
        host: the solo-learn in use.
        protocol: of it ``corruptions`` and ``label_free`` do not count.
        data: of one labelled data set, as ``protocol.datasets`` has them.

    Returns:
        Measures by name.
    """
    found = _Evaluation(pretrained, host, protocol, data).measures()
    return found | _dense_where_asked(pretrained, host, protocol)


def evaluate(run: Run, protocol: EvaluationConfig) -> dict[str, float]:
    """Measures of a finished run by name; kept beside it, and not computed twice.

    Args:
        run: whose result is there.
        protocol: what to evaluate and how.

    Returns:
        Accuracies in per cent (``knn_acc1``, ``linear_acc1``, ``finetune_10_acc1`` for 10 % of the
        labels, ``online_acc1``; ``knn_acc1/NAME`` on another data set), what was chosen
        (``knn_k``, ``linear_lr``), ``query_entropy`` in nats, and what the run measured itself.
        A run without labels has ``rankme``, ``lidar``, ``alpha_req``, ``uniformity`` and
        ``alignment`` in place of accuracies. Pictures for a report go to the run's folder.
    """
    path, settings = run.folder / EVALUATION, asdict(protocol)
    if path.is_file() and (old := read_json(path))["protocol"] == settings:
        return old["metrics"]
    host = find_host()
    pretrained = read_pretrained(run.checkpoint)
    cfg = pretrained.cfg
    labelled = not without_labels(cfg)
    own = own_data(cfg)
    metrics = _measured(run)
    changed = _changed(load_method(pretrained, host), cfg, host)
    if not labelled:
        backbone = load_backbone(pretrained, host)
        images = _unlabelled(cfg, host, protocol.label_free.rank_images)
        features = _features_of(backbone, images, cfg.data.num_workers)
        make_gallery(features, None, _picture(images), changed).save(run.folder)
        metrics |= _label_free(cfg, host, backbone, features, protocol)
    sets = ({"": own} if labelled else {}) | plain(protocol.datasets)
    for name, data in sets.items():
        evaluation = _Evaluation(pretrained, host, protocol, data, name)
        if not name:
            picture = _picture(evaluation.test_set)
            make_gallery(*evaluation.test, picture, changed).save(run.folder)
            if "label_free" in protocol.measures:
                features = evaluation.test[0][: protocol.label_free.rank_images]
                metrics |= _label_free(cfg, host, evaluation.backbone, features, protocol)
        found = evaluation.measures()
        if "corruptions" in protocol.measures and not name:
            print(f"{cfg.name}  corruptions", flush=True)
            found |= evaluation.corruptions(int(found["knn_k"]))
        metrics |= found
    metrics |= _dense_where_asked(pretrained, host, protocol)
    torch.manual_seed(cfg.seed)  # the same views for a baseline and its variant
    model = load_method(pretrained, host)
    metrics["query_entropy"] = query_entropy(model, host, pretrain_loader(cfg, host))
    write_json(path, {"protocol": settings, "metrics": metrics, "versions": versions(host)})
    return metrics
