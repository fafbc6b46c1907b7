"""Retrieval: is what an image belongs with among its nearest neighbours?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.knn import BLOCK


@torch.no_grad()
def recall_at_k(
    features: Tensor,
    groups: Tensor,
    k: Sequence[int] = (1, 5, 10),
    *,
    sources: Tensor | None = None,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> dict[int, float]:
    """Share of queries, in per cent, with one of their group among the k nearest other images.

    Recall@k as in metric learning (Oh Song et al. 2016, arXiv 1511.06452, section 6): every image
    is a query, all others are what is searched, by the cosine of their features. Images without
    another one of their group to be found are no queries.

    Args:
        features: (N, d).
        groups: (N,) what belongs together: labels, or objects.
        k: how many neighbours count.
        sources: (N,) where an image is from; those of the query's own source are not searched, so
            that the same object has to be found as another one made it.
        device: where to compute.
        block: entries of the (N, N) matrix of similarities that may be there at once.

    Raises:
        IECLError: when no image has another one to be found.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.6]])
        >>> recall_at_k(x, torch.tensor([0, 0, 1, 1]), k=[1])
        {1: 100.0}
    """
    x = F.normalize(features.float()).to(device)
    groups = groups.to(device)
    sources = torch.arange(len(x), device=device) if sources is None else sources.to(device)
    right, queries = dict.fromkeys(k, 0), 0
    everywhere = torch.arange(len(x), device=device)
    for rows in everywhere.split(max(1, block // max(1, len(x)))):
        near = x[rows] @ x.T
        hidden = (sources[rows, None] == sources) | (rows[:, None] == everywhere)
        near.masked_fill_(hidden, -torch.inf)
        wanted = (groups[rows, None] == groups) & ~hidden
        asked = wanted.any(1)
        queries += int(asked.sum())
        top = near.topk(min(max(k), len(x)), dim=1).indices
        hits = wanted.gather(1, top)[asked]
        for n in k:
            right[n] += int(hits[:, :n].any(1).sum())
    if not queries:
        raise IECLError("retrieval: no image has another one of its group to be found")
    return {n: 100 * found / queries for n, found in right.items()}


def groups_by_name(files: Sequence[Path | str], pattern: str) -> tuple[Tensor, Tensor | None]:
    """Groups, and sources if the pattern has any, out of files' paths.

    Args:
        files: paths, with / between folders.
        pattern: a regular expression with a named group ``object``, and optionally ``source``;
            searched in each path.

    Returns:
        Groups (N,) and sources (N,) as numbers; None where the pattern has no ``source``.

    Raises:
        IECLError: for a pattern that is none, has no ``object``, or does not match a path.

    Example:
        >>> names = ["apple/cat.png", "google/cat.png", "apple/dog.png"]
        >>> groups_by_name(names, r"(?P<source>[^/]+)/(?P<object>[^/.]+)")
        (tensor([0, 0, 1]), tensor([0, 1, 0]))
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise IECLError(f"retrieval pattern {pattern!r}: {error}") from None
    if "object" not in expression.groupindex:
        raise IECLError(f"retrieval pattern {pattern!r}: it has no group (?P<object>...)")
    found: dict[str, list[str]] = {name: [] for name in expression.groupindex}
    for file in files:
        match = expression.search(Path(file).as_posix())
        if match is None:
            raise IECLError(f"retrieval pattern {pattern!r}: it does not match {file}")
        for name in found:
            found[name].append(match.group(name) or "")
    numbered = {}
    for name, values in found.items():
        place = {value: i for i, value in enumerate(dict.fromkeys(values))}
        numbered[name] = torch.tensor([place[value] for value in values])
    return numbered["object"], numbered.get("source")
