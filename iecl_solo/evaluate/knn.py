"""Weighted k-nearest-neighbour accuracy as the host's classifier has it, many k in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iecl_solo.errors import IECLError, unknown_name

DISTANCES = ("cosine", "euclidean")

#: Entries of a block of similarities (64 MiB in float32); no more of the matrix is ever there.
BLOCK = 2**24

# what the host adds to a distance before it inverts it
_EPSILON = 1e-5


@torch.no_grad()
def extract_features(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Features (N, d) and labels (N,) of a loader, on the CPU; the network in eval mode."""
    network = network.to(device).eval()
    features, labels = [], []
    for images, targets in batches:
        features.append(network(images.to(device)).float().cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


def nearest(
    queries: Tensor, bank: Tensor, k: int, *, distance: str = "cosine", block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of a bank for each query, exactly, by blocks of queries.

    Args:
        queries: (M, d).
        bank: (N, d), on the same device.
        k: how many; all N if there are fewer.
        distance: "cosine", or "euclidean", whose similarity is 1 / (distance + 1e-5).
        block: entries of the (M, N) matrix that may be there at once.

    Returns:
        Similarities (M, k), largest first, and their rows in the bank (M, k).

    Raises:
        IECLError: for an unknown distance.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> nearest(torch.tensor([[0.0, 2.0]]), bank, k=2)[1]
        tensor([[1, 2]])
    """
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    if distance == "cosine":
        queries, bank = F.normalize(queries), F.normalize(bank)
    k, rows = min(k, len(bank)), max(1, block // len(bank))
    similar, indices = [], []
    for part in queries.split(rows):
        near = part @ bank.T if distance == "cosine" else 1 / (torch.cdist(part, bank) + _EPSILON)
        top = near.topk(k, dim=1)
        similar.append(top.values)
        indices.append(top.indices)
    return torch.cat(similar), torch.cat(indices)


@torch.no_grad()
def knn_accuracies(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    distance: str = "cosine",
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in per cent for each k, equal to the host's classifier's.

    A neighbour votes with exp(cosine / temperature), or with 1 / (distance + 1e-5) where the
    distance is Euclidean (Wu et al. 2018, arXiv 1805.01978, section 3.4). Neighbours are searched
    once, for the largest k; the smaller ones take the first of them.

    Args:
        train: features (N, d) and labels (N,) that vote.
        test: features (M, d) and labels (M,) that are classified.
        k: numbers of neighbours that vote (all of them if there are fewer).
        temperature: of the cosine weights; not used with euclidean distance.
        distance: cosine or euclidean.
        device: where to compute.
        block: entries of the (M, N) matrix of similarities that may be there at once.

    Raises:
        IECLError: for an unknown distance, or when there is nothing to vote or to classify.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> knn_accuracies((x, y), (x, y), k=[1, 2])
        {1: (100.0, 100.0), 2: (100.0, 100.0)}
    """
    if not len(train[0]) or not len(test[0]):
        raise IECLError(f"k-NN of {len(train[0])} and {len(test[0])} features: none may be empty")
    bank, votes = train[0].to(device), train[1].to(device)
    classes = int(torch.cat([train[1], test[1]]).max()) + 1
    rows = max(1, block // max(len(bank), classes))
    right = {n: [0, 0] for n in k}
    for features, labels in zip(test[0].split(rows), test[1].split(rows), strict=True):
        weights, found = nearest(features.to(device), bank, max(k), distance=distance, block=block)
        if distance == "cosine":
            # of the nearest, so that no weight overflows at a small temperature
            weights = ((weights - weights[:, :1]) / temperature).exp()
        voted, truth = votes[found], labels.to(device)[:, None]
        for n in k:
            scores = torch.zeros(len(features), classes, device=device, dtype=weights.dtype)
            scores.scatter_add_(1, voted[:, :n], weights[:, :n])
            ranked = scores.sort(1, descending=True).indices == truth
            right[n][0] += int(ranked[:, 0].sum())
            right[n][1] += int(ranked[:, : min(5, n, len(bank))].sum())  # as the host counts
    share = 100 / len(test[1])
    return {n: (share * top1, share * top5) for n, (top1, top5) in right.items()}


def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, k: int = 20, **options: object
) -> tuple[float, float]:
    """``knn_accuracies`` of one k: top-1 and top-5 in per cent."""
    return knn_accuracies(train, test, k=[k], **options)[k]  # type: ignore[arg-type]


def knn_rows(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    k: Sequence[int],
    temperature: Sequence[float],
    distance: Sequence[str],
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """``knn_accuracies`` of every combination, a row each as soon as its distance is done.

    Args:
        train: features (N, d) and labels (N,) that vote.
        test: features (M, d) and labels (M,) that are classified.
        k: numbers of neighbours that vote.
        temperature: of the cosine weights; with euclidean distance there is none.
        distance: cosine, euclidean or both.
        device: where to compute.

    Raises:
        IECLError: as ``knn_accuracies``.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> list(knn_rows((x, y), (x, y), k=[1], temperature=[0.1, 0.2], distance=["euclidean"]))
        [{'distance': 'euclidean', 'k': 1, 'acc1': 100.0, 'acc5': 100.0}]
    """
    for name in distance:
        heats = temperature if name == "cosine" else temperature[:1]
        scores = {
            heat: knn_accuracies(train, test, k=k, temperature=heat, distance=name, device=device)
            for heat in heats
        }
        for n, heat in product(k, heats):
            top1, top5 = scores[heat][n]
            row: dict[str, Any] = {"distance": name, "k": n, "acc1": top1, "acc5": top5}
            yield row | ({"temperature": heat} if name == "cosine" else {})
