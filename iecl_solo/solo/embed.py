"""H(Z') of a trained method on given images, the same way for a method and its twin."""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from iecl_solo.entropy import coding_rate
from iecl_solo.solo.host import Host
from iecl_solo.solo.wrapper import find_embedder, objectives


@torch.no_grad()
def embed(model: LightningModule, host: Host, x: Tensor, *, query: bool = False) -> Tensor:
    """L2-normalised embeddings (B, d) of views (B, 3, H, W), as the method's loss would see them.

    Args:
        model: a method of the host, or its twin.
        host: the solo-learn in use.
        x: the views.
        query: whether they are the query, which the twin transforms first.
    """
    if query:
        for objective in objectives(model).values():
            x = objective.transform(x, objective.views.query[0], "online")
    path = find_embedder(model, "online")
    assert path is not None  # every method with a twin has one
    features = getattr(model, host.online)(x)
    return F.normalize(model.get_submodule(path)(features).float(), dim=-1)


def query_entropy(
    model: LightningModule, host: Host, loader: DataLoader, max_batches: int = 8
) -> float:
    """Coding rate H(Z') in nats of the query's embeddings, mean over batches, in eval mode.

    Args:
        model: a method of the host, or its twin; the host alone has no transform, so its query
            is the raw view.
        host: the solo-learn in use.
        loader: batches of the host's pretraining loader, ``[index, views, label]``.
        max_batches: how many batches to average over.
    """
    model = model.cpu().eval()
    values = [
        coding_rate(embed(model, host, views[1], query=True))
        for _, views, _ in islice(loader, max_batches)
    ]
    return float(torch.stack(values).mean())
