"""Every evaluation of a finished run, once: its measures by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Subset

from iecl_solo.evaluate.knn import extract_features, knn_accuracies, knn_accuracy
from iecl_solo.evaluate.linear import linear_accuracy
from iecl_solo.evaluate.load import Pretrained, load_backbone, load_method, read_pretrained
from iecl_solo.evaluate.probe import fit_probes
from iecl_solo.evaluate.protocol import (
    EvaluationConfig,
    KNNProtocol,
    decay_epochs,
    linear_config,
)
from iecl_solo.files import read_json, write_json
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import evaluation_datasets, evaluation_loader, pretrain_loader
from iecl_solo.solo.embed import query_entropy
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.settings import prepare_linear
from iecl_solo.train.fit import trainer_arguments
from iecl_solo.train.logs import read_monitor
from iecl_solo.train.run import Run, versions

EVALUATION = "evaluation.json"
Labelled = tuple[Tensor, Tensor]


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


def device() -> str:
    """Where features are computed and compared."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _knn(
    train: Labelled, test: Labelled, protocol: KNNProtocol, held_out: float
) -> dict[str, float]:
    options: dict[str, Any] = {
        "temperature": protocol.temperature,
        "distance": protocol.distance,
        "device": device(),
    }
    best = protocol.k[0]
    if len(protocol.k) > 1:
        chosen, rest = split(train[1], held_out, 0)
        scores = knn_accuracies(_at(train, rest), _at(train, chosen), k=protocol.k, **options)
        best = max(scores, key=lambda k: scores[k][0])
    top1, top5 = knn_accuracy(train, test, k=best, **options)
    return {"knn_acc1": top1, "knn_acc5": top5, "knn_k": best}


class _Evaluation:
    """One run's backbone on one labelled data set."""

    def __init__(
        self, pretrained: Pretrained, host: Host, protocol: EvaluationConfig, data: dict[str, Any]
    ) -> None:
        self.pretrained, self.host, self.protocol, self.data = pretrained, host, protocol, data
        self.cfg = pretrained.cfg
        self.backbone = load_backbone(pretrained, host)
        plain_train, test = self._datasets(augment=False)
        self.train, self.test = (self._features(s) for s in (plain_train, test))

    def _datasets(self, *, augment: bool) -> tuple[Any, Any]:
        return evaluation_datasets(
            self.host,
            self.data["dataset"],
            self.data["train_path"],
            self.data["val_path"],
            image_size=self.cfg.augmentations[0].crop_size,
            augment=augment,
            data_format=self.data.get("format", "image_folder"),
        )

    def _features(self, dataset: Any) -> Labelled:
        return extract_features(
            self.backbone, evaluation_loader(dataset, 256, self.cfg.data.num_workers), device()
        )

    def _config(self, protocol: Any) -> tuple[DictConfig, dict[str, Any]]:
        linear = linear_config(self.cfg, self.data, protocol, str(self.pretrained.path))
        linear = prepare_linear(linear, self.host)
        arguments = trainer_arguments(linear) | {
            "logger": False,
            "enable_progress_bar": False,
            "check_val_every_n_epoch": linear.max_epochs,  # only the last one counts
        }
        return linear, arguments

    def _on_features(
        self, rates: Sequence[float], train: Labelled, test: Labelled
    ) -> list[tuple[float, float]]:
        """Test accuracies of one probe a rate, all trained together."""
        protocol = self.protocol.linear
        probes = fit_probes(
            *train,
            [rate * protocol.batch_size / 256 for rate in rates],
            classes=int(torch.cat([train[1], test[1]]).max()) + 1,
            max_epochs=protocol.max_epochs,
            decay_epochs=decay_epochs(protocol.max_epochs),
            batch_size=protocol.batch_size,
            weight_decay=protocol.weight_decay,
            seed=self.cfg.seed,
            device=device(),
        )
        return probes.accuracies(*test)

    def knn(self) -> dict[str, float]:
        return _knn(self.train, self.test, self.protocol.knn, self.protocol.held_out)

    def linear(self) -> dict[str, float]:
        protocol, best = self.protocol.linear, self.protocol.linear.lr[0]
        if len(protocol.lr) > 1:
            chosen, rest = split(self.train[1], self.protocol.held_out, 0)
            parts = _at(self.train, rest), _at(self.train, chosen)
            scores = [top1 for top1, _ in self._on_features(protocol.lr, *parts)]
            best = max(zip(scores, protocol.lr, strict=True), key=lambda s: (s[0] == s[0], s[0]))[1]
        if protocol.augment:
            linear, arguments = self._config(protocol)
            linear.optimizer.lr *= best / protocol.lr[0]
            sets = self._datasets(augment=True)
            top = linear_accuracy(linear, self.backbone, self.host, *sets, arguments)
        else:
            (top,) = self._on_features([best], self.train, self.test)
        return {"linear_acc1": top[0], "linear_acc5": top[1], "linear_lr": best}

    def finetune(self, fraction: float) -> float:
        linear, arguments = self._config(self.protocol.finetune)
        train, test = self._datasets(augment=True)
        few, _ = split(self.train[1], fraction, self.cfg.seed) if fraction < 1 else (None, None)
        if few is not None:
            train = Subset(train, few)
        backbone = load_backbone(self.pretrained, self.host)  # it is changed
        return linear_accuracy(linear, backbone, self.host, train, test, arguments)[0]


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


def evaluate(run: Run, protocol: EvaluationConfig) -> dict[str, float]:
    """Measures of a finished run by name; kept beside it, and not computed twice.

    Args:
        run: whose result is there.
        protocol: what to evaluate and how.

    Returns:
        Accuracies in per cent (``knn_acc1``, ``linear_acc1``, ``finetune_10_acc1`` for 10 % of the
        labels, ``online_acc1``; ``knn_acc1/NAME`` on another data set), what was chosen
        (``knn_k``, ``linear_lr``), ``query_entropy`` in nats, and what the run measured itself.
    """
    path, settings = run.folder / EVALUATION, asdict(protocol)
    if path.is_file() and (old := read_json(path))["protocol"] == settings:
        return old["metrics"]
    host = find_host()
    pretrained = read_pretrained(run.checkpoint)
    cfg = pretrained.cfg
    own = {name: cfg.data[name] for name in ("dataset", "train_path", "val_path", "format")}
    metrics = _measured(run)
    for name, data in {"": own, **plain(protocol.datasets)}.items():
        evaluation = _Evaluation(pretrained, host, protocol, data)
        found = evaluation.knn()
        if protocol.linear.max_epochs:
            print(f"{cfg.name}  linear evaluation {name}".rstrip(), flush=True)
            found |= evaluation.linear()
        for fraction in protocol.finetune.fractions:
            print(f"{cfg.name}  fine-tuning on {fraction:.0%} {name}".rstrip(), flush=True)
            found[f"finetune_{100 * fraction:g}_acc1"] = evaluation.finetune(fraction)
        metrics |= {f"{k}/{name}" if name else k: v for k, v in found.items()}
    torch.manual_seed(cfg.seed)  # the same views for a method and its twin
    model = load_method(pretrained, host)
    metrics["query_entropy"] = query_entropy(model, host, pretrain_loader(cfg, host))
    write_json(path, {"protocol": settings, "metrics": metrics, "versions": versions(host)})
    return metrics
