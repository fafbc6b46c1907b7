"""Weighted k-nearest-neighbour accuracy, by the host's own classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from iecl_solo.errors import unknown_name
from iecl_solo.solo.host import Host

DISTANCES = ("cosine", "euclidean")


@torch.no_grad()
def extract_features(
    network: nn.Module, loader: DataLoader, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Features (N, d) and labels (N,) of a loader, on the CPU; the network in eval mode."""
    network = network.to(device).eval()
    features, labels = [], []
    for images, targets in loader:
        features.append(network(images.to(device)).float().cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    host: Host,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    k: int = 20,
    temperature: float = 0.07,
    distance: str = "cosine",
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in per cent of the host's ``WeightedKNNClassifier``.

    Args:
        host: the solo-learn in use.
        train: features (N, d) and labels (N,) that vote.
        test: features (M, d) and labels (M,) that are classified.
        k: neighbours that vote (all of them if there are fewer).
        temperature: of the cosine weights; not used with euclidean distance.
        distance: cosine or euclidean.
    """
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    classifier = host.import_module("utils.knn").WeightedKNNClassifier(
        k=k, T=temperature, distance_fx=distance
    )
    # 1.0.2 leaves the normalisation of the cosine to its caller; on main it changes nothing
    train_x, test_x = (F.normalize(x) if distance == "cosine" else x for x in (train[0], test[0]))
    classifier.update(train_features=train_x, train_targets=train[1])
    classifier.update(test_features=test_x, test_targets=test[1])
    top1, top5 = classifier.compute()
    return float(top1), float(top5)
