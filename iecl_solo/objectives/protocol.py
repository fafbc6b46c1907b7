"""What an objective is: terms added to a host's loss, computed from views and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from iecl_solo.entropy import gaussian_kl
from iecl_solo.errors import IECLError

#: Which network a view is about to enter. A host without a momentum network has only "online".
Side = Literal["online", "momentum"]


@dataclass(frozen=True)
class Views:
    """How the views of one step divide into query and anchor.

    Attributes:
        num_views: large crops of one image.
        momentum: whether the host has a momentum network, which then holds the anchor.
        query: the large crops that are the query on the online side.
    """

    num_views: int
    momentum: bool
    query: tuple[int, ...]

    @property
    def anchor(self) -> tuple[int, ...]:
        """Large crops whose embedding is the anchor, on the momentum side if there is one."""
        if self.momentum:
            return tuple(range(self.num_views))
        return tuple(v for v in range(self.num_views) if v not in self.query)


@dataclass(frozen=True)
class Space:
    """Where the host's embeddings live.

    Attributes:
        dim: d of an embedding.
        num_prototypes: K, where the host compares embeddings with prototypes by a softmax (DINO).
        temperature: of that softmax, on the online side.
    """

    dim: int
    num_prototypes: int | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Made:
    """What the networks made of the large crops in one step, by crop.

    A host may leave crops out on one of the sides.

    Attributes:
        online: embeddings (B, d), with gradient.
        momentum: embeddings (B, d) of the momentum network; empty if there is none.
        scores: (B, K) of the online embeddings against the host's prototypes; empty if it has none.
    """

    online: Mapping[int, Tensor]
    momentum: Mapping[int, Tensor] = field(default_factory=dict)
    scores: Mapping[int, Tensor] = field(default_factory=dict)

    def query_and_anchor(self, views: Views) -> tuple[Tensor, Tensor]:
        """Embeddings of the query views and of the anchor views, each (B * views, d).

        Raises:
            IECLError: when there is none of either.

        >>> made = Made({0: torch.zeros(2, 3), 1: torch.ones(2, 3)})
        >>> query, anchor = made.query_and_anchor(Views(2, momentum=False, query=(1,)))
        >>> query.mean().item(), anchor.mean().item()
        (1.0, 0.0)
        """
        other = self.momentum if views.momentum else self.online
        return of_views(self.online, views.query), of_views(other, views.anchor)


def of_views(rows: Mapping[int, Tensor], views: tuple[int, ...]) -> Tensor:
    """The rows of those of ``views`` that there are, one below the other.

    Raises:
        IECLError: when there are none.
    """
    found = [z for view, z in rows.items() if view in views]
    if not found:
        raise IECLError(f"the host made no embedding of the views {list(views)} in this step")
    return torch.cat(found)


@dataclass(frozen=True)
class Term:
    """One term of an objective.

    Attributes:
        value: 0-dim.
        weight: what multiplies it in the loss.
        logged: whether its value says something to a person.
    """

    value: Tensor
    weight: float
    logged: bool = True


class Objective(nn.Module):
    """Base of everything that ``with_objective`` can add to a host method.

    A subclass is built as ``Objective(config, image_size, views, network, space)`` and must not
    touch the global random state in a way that is seen outside (the wrapper sees to that).
    Its state-dict keys must not contain "encoder" or "backbone": the host's linear evaluation
    would take them for the network.

    Attributes:
        name: prefix of the registered methods, of the log entries and name of the config block.
        Config: the dataclass that the config block is checked against.
        labels: by term, what a report calls it and its unit; a term that is not here goes by its
            own name.
        shown: terms worth a place on the line that a run prints for each epoch.
        query: what the query's embeddings are called, in H(...).
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    labels: ClassVar[Mapping[str, tuple[str, str]]] = {}
    shown: ClassVar[tuple[str, ...]] = ()
    query: ClassVar[str] = "Z"
    views: Views

    @property
    def parametrizes(self) -> bool:
        """Whether the host's networks are to be spectrally normalised layer by layer."""
        return False

    @property
    def transformer(self) -> nn.Module | None:
        """What it learns to make of a view, (B, C, H, W) to the same; None if it learns nothing."""
        return None

    def divergence(self, query: Tensor, anchor: Tensor) -> Tensor:
        """How far the query's embeddings are from the anchor's, in nats per dimension, for the log.

        Default: KL of the two as Gaussians with diagonal covariance.
        """
        return gaussian_kl(query, anchor, covariance="diagonal") / query.shape[1]

    @property
    def lr_multiplier(self) -> float:
        """Learning rate of the objective's own parameters over the host's."""
        return 1.0

    def transform(self, x: Tensor, view: int, side: Side) -> Tensor:
        """What a large crop (B, C, H, W) becomes before it enters the network. Default: itself."""
        return x

    def terms(self, made: Made, epoch: float) -> dict[str, Term]:
        """The terms to log and to add to the host's loss.

        Args:
            made: the embeddings of this step.
            epoch: fractional epoch, for warm-up schedules.
        """
        raise NotImplementedError

    def weight_terms(self, network: nn.Module) -> dict[str, Term]:
        """Terms of weights alone, computed before the host's forward pass. Default: none.

        Args:
            network: the online network.
        """
        return {}

    def before_optimizer_step(self) -> None:
        """Called when the gradients of a step are complete and unscaled. Default: nothing."""


def warmup(epoch: float, epochs: float) -> float:
    """Linear ramp from 0 to 1 over the first ``epochs`` epochs (ours; the papers are silent).

    >>> warmup(2.5, 10.0), warmup(10.0, 10.0), warmup(0.0, 0.0)
    (0.25, 1.0, 1.0)
    """
    return 1.0 if epochs <= 0 else min(1.0, epoch / epochs)


def total(terms: dict[str, Term]) -> Tensor | None:
    """The weighted sum of the terms that carry weight; None if none does.

    A term of weight 0 is left out rather than multiplied: 0 times inf is not 0, and a host whose
    objective weighs nothing must stay bit for bit what it was.

    >>> total({"kl": Term(torch.tensor(3.0), 0.5), "entropy": Term(torch.tensor(9.0), 0.0)})
    tensor(1.5000)
    """
    parts = [term.weight * term.value for term in terms.values() if term.weight != 0]
    return torch.stack(parts).sum() if parts else None
