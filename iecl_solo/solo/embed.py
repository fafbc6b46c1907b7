"""H(Z') of a trained method on given images, the same way for a baseline and its variant."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from iecl_solo.entropy import coding_rate
from iecl_solo.objectives.protocol import Side
from iecl_solo.solo.host import Host
from iecl_solo.solo.wrapper import find_embedder, objectives

#: What a view is to the loss: the query, the anchor, or neither and then as it is.
Role = Literal["query", "anchor", "raw"]


@torch.no_grad()
def embed(model: LightningModule, host: Host, x: Tensor, role: Role = "raw") -> Tensor:
    """L2-normalised embeddings (B, d) of views (B, 3, H, W), as the method's loss would see them.

    Args:
        model: a method of the host, or a variant of it.
        host: the solo-learn in use.
        x: the views.
        role: the query goes through the online network, the anchor through the momentum network
            where there is one, and both through the transforms that stand there; a raw view goes
            through the online network alone.
    """
    momentum = hasattr(model, host.momentum) and find_embedder(model, "momentum") is not None
    side: Side = "momentum" if role == "anchor" and momentum else "online"
    if role != "raw":
        for objective in objectives(model).values():
            views = objective.views
            view = (views.query if role == "query" else views.anchor)[0]
            x = objective.transform(x, view, side)
    path = find_embedder(model, side)
    assert path is not None  # every method that has a variant has one
    features = getattr(model, host.momentum if side == "momentum" else host.online)(x)
    return F.normalize(model.get_submodule(path)(features).float(), dim=-1)


def query_entropy(
    model: LightningModule, host: Host, loader: Iterable[Any], max_batches: int = 8
) -> float:
    """Coding rate H(Z') in nats of the query's embeddings, mean over batches, in eval mode.

    Args:
        model: a method of the host, or a variant of it. The host alone has no transform, so its
            query is the raw view.
        host: the solo-learn in use.
        loader: batches of the host's pretraining loader, ``[index, views, label]``.
        max_batches: how many batches to average over.
    """
    model = model.cpu().eval()
    values = [
        coding_rate(embed(model, host, views[1], "query"))
        for _, views, _ in islice(loader, max_batches)
    ]
    return float(torch.stack(values).mean())
