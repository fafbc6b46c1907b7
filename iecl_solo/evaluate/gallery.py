"""Pictures of a trained run: nearest neighbours, a map of embeddings, changed views.

Kept as one ``gallery.npz`` in the run's folder, for a report to draw: small pictures, no features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from iecl_solo.checks import installed
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.knn import nearest
from iecl_solo.files import replacing

GALLERY = "gallery.npz"

#: Images that are asked for their neighbours, neighbours of each, points of the map, views.
QUERIES, NEIGHBOURS, POINTS, VIEWS = 6, 5, 800, 6

#: Height and width of a kept picture, in pixels, at most.
SIZE = 64


@dataclass(frozen=True)
class Gallery:
    """What a report draws of one run.

    Attributes:
        pictures: (P, s, s, 3) uint8, each image that is shown once.
        queries: (Q,) rows of ``pictures``.
        neighbours: (Q, k) rows of ``pictures``, nearest first.
        same: (Q, k) whether a neighbour has the query's label; all True where there are none.
        points: (M, 2) positions of images on the map.
        labels: (M,) their labels, -1 where there are none.
        map_name: how the map was made: PCA, or UMAP where it is installed.
        before: (V, s, s, 3) uint8, views as the host hands them on; empty without a transform.
        after: the same views as the objective's transform makes them, at the views' contrast.
    """

    pictures: np.ndarray
    queries: np.ndarray
    neighbours: np.ndarray
    same: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    map_name: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def save(self, folder: Path) -> None:
        """Write ``gallery.npz``, whole or not at all."""
        # a file that is open: to a name, NumPy would add its own ending
        with replacing(folder / GALLERY) as part, part.open("wb") as file:
            np.savez_compressed(file, **asdict(self))


def read_gallery(folder: Path) -> Gallery | None:
    """The gallery of a run's folder, None where there is none that can be read."""
    try:
        with np.load(folder / GALLERY) as kept:
            return Gallery(**{name: kept[name] for name in kept.files})
    except (OSError, ValueError, TypeError):
        return None


def _spread(count: int, wanted: int) -> list[int]:
    """Rows over the whole of a data set, the same ones for every run on it."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist()


def embedding_map(features: Tensor) -> tuple[np.ndarray, str]:
    """Positions (N, 2) of features (N, d) on a plane: by UMAP where it is installed, else PCA.

    Of L2-normalised features; seeded, so that it is the same twice.

    Example:
        >>> points, name = embedding_map(torch.eye(5))
        >>> points.shape, name in ("PCA", "UMAP")
        ((5, 2), True)
    """
    x = F.normalize(features.double(), dim=1).numpy()
    if installed("umap") and len(x) > 15:
        import umap

        return umap.UMAP(random_state=0, n_jobs=1).fit_transform(x).astype(np.float32), "UMAP"
    if min(x.shape) < 2:
        raise IECLError(f"a map of features of shape {x.shape}: two of each are needed")
    return PCA(2, svd_solver="full").fit_transform(x).astype(np.float32), "PCA"


def to_pixels(images: Tensor, low: Tensor | float = 0.0, high: Tensor | float = 1.0) -> np.ndarray:
    """(B, 3, H, W) in [low, high] as (B, s, s, 3) uint8, no larger than ``SIZE``."""
    x = ((images.float() - low) / (high - low)).clamp(0, 1)
    if x.shape[-1] > SIZE:
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
    return (255 * x).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def matched(after: Tensor, before: Tensor) -> Tensor:
    """Images (B, 3, H, W), each at the mean and the contrast of the view that it was made of.

    A plain scaling is undone by the first batch norm, and on the view's own scale it would only
    show as saturated pixels.
    """
    dims = (1, 2, 3)
    mean, deviation = before.mean(dims, keepdim=True), before.std(dims, keepdim=True)
    own_deviation = after.std(dims, keepdim=True).clamp_min(1e-6)
    return (after - after.mean(dims, keepdim=True)) / own_deviation * deviation + mean


def changed_views(views: Tensor, after: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Views (B, 3, H, W) and what a transform made of them, ``matched``, on the views' scale."""
    views, after = views.float().cpu(), after.float().cpu()
    dims = (1, 2, 3)
    low, high = views.amin(dims, keepdim=True), views.amax(dims, keepdim=True) + 1e-6
    return to_pixels(views, low, high), to_pixels(matched(after, views), low, high)


def make_gallery(
    features: Tensor,
    labels: Tensor | None,
    picture: Callable[[int], np.ndarray],
    changed: tuple[np.ndarray, np.ndarray] | None = None,
) -> Gallery:
    """Neighbours and map of a data set's features.

    Args:
        features: (N, d), N >= 2.
        labels: (N,), None where there are none.
        picture: the pixels (s, s, 3) of an image by its row.
        changed: views before and after the objective's transform, if it has one.
    """
    queries = _spread(len(features), QUERIES)
    _, found = nearest(features[queries], features, min(NEIGHBOURS, len(features) - 1) + 1)
    rows: list[list[int]] = []
    for query, row in zip(queries, found.tolist(), strict=True):
        others = [i for i in row if i != query]  # an equal image may stand before itself
        rows.append(others[: len(row) - 1])
    shown: Sequence[int] = sorted({*queries, *(i for row in rows for i in row)})
    place = {i: n for n, i in enumerate(shown)}
    known = labels if labels is not None else torch.full((len(features),), -1)
    same = [[bool(known[i] == known[q]) for i in row] for q, row in zip(queries, rows, strict=True)]
    points = _spread(len(features), POINTS)
    positions, name = embedding_map(features[points])
    nothing: Any = np.zeros((0, 1, 1, 3), np.uint8)
    before, after = changed if changed is not None else (nothing, nothing)
    return Gallery(
        pictures=np.stack([picture(i) for i in shown]),
        queries=np.array([place[q] for q in queries]),
        neighbours=np.array([[place[i] for i in row] for row in rows]),
        same=np.array(same),
        points=positions,
        labels=known[points].numpy(),
        map_name=np.array(name),
        before=before[:VIEWS],
        after=after[:VIEWS],
    )
