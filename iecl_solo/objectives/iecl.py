"""IE-CL: L = L_host + beta KL(p_phi || q) - lambda H(Z') + eta L_reg(f) + gamma R(g_phi).

Zhang et al., "Maximizing Incremental Information Entropy for Contrastive Learning", ICLR 2026,
arXiv 2603.12594. ``L_host`` is the host method's own loss and is not touched here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iecl_solo import entropy as estimators
from iecl_solo.entropy import gaussian_kl
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.lipschitz import SpectralRegularizer
from iecl_solo.objectives.protocol import Made, Objective, Side, Space, Term, Views, warmup
from iecl_solo.saib import SAIB

PLACEMENTS = ("none", "query", "anchor", "both")
COVARIANCES = ("diagonal", "full")
REGULARIZERS = ("penalty", "bilipschitz", "parametrize")
NORMS = ("reshaped", "convolution")


def _one_of(key: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise IECLError(f"{key}: {unknown_name('value', given, allowed)}")


def _at_least(key: str, given: float, minimum: float) -> None:
    if not given >= minimum:
        raise IECLError(f"{key}: {given} is not allowed, at least {minimum} is")


@dataclass
class SAIBConfig:
    """Options of the transform g_phi; see ``iecl_solo.saib.SAIB`` for what each one does.

    ``outer_skip: null`` is off where there is one (ours, see docs/defaults.md): with it the paper's
    variant begins as x -> 2x, which is no new view.
    """

    variant: str = "paper"
    patch_size: int = 4
    expansion: int = 2
    depth: int = 1
    activation: str | None = None  # the variant's own: gelu, or tanh for convex
    positional_encoding: bool = True
    inner_skip: bool = True
    outer_skip: bool | None = None
    match_statistics: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``SAIB``."""
        given = asdict(self)
        if self.outer_skip is None:
            del given["outer_skip"]
            if self.variant == "paper":
                given["outer_skip"] = False
        return given


@dataclass
class KLConfig:
    """How the two Gaussians of the KL term are fitted; see ``iecl_solo.entropy.gaussian_kl``."""

    covariance: str = "diagonal"
    shrinkage: float = 0.1

    def __post_init__(self) -> None:
        _one_of("iecl.kl.covariance", self.covariance, COVARIANCES)


@dataclass
class EntropyConfig:
    """The estimator of H(Z') and its options (``null``: the estimator's own default).

    See ``iecl_solo.entropy``: ``eps`` is of coding_rate, ``shrinkage`` of gaussian,
    ``num_neighbors`` of knn, ``concentration`` of vmf_kde, ``alpha`` and ``bandwidth`` of renyi.
    """

    estimator: str = "coding_rate"
    eps: float | None = None
    shrinkage: float | None = None
    num_neighbors: int | None = None
    concentration: float | None = None
    alpha: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _one_of("iecl.entropy.estimator", self.estimator, tuple(estimators.ESTIMATORS))
        # an option of another estimator is refused now, not in the first step
        estimators.estimate(self.estimator, torch.eye(8), **self.options())

    def options(self) -> dict[str, float]:
        """The options that were given, as keyword arguments of the estimator."""
        given = {k: v for k, v in asdict(self).items() if k != "estimator"}
        return {k: v for k, v in given.items() if v is not None}


@dataclass
class RegularizerConfig:
    """L_reg(f); see ``iecl_solo.lipschitz``. ``parametrize`` is on whatever ``eta`` is not 0."""

    mode: str = "penalty"
    power_iterations: int = 1
    sigma_min_floor: float = 0.1
    norm: str = "reshaped"

    def __post_init__(self) -> None:
        _one_of("iecl.regularizer.mode", self.mode, REGULARIZERS)
        _one_of("iecl.regularizer.norm", self.norm, NORMS)
        _at_least("iecl.regularizer.power_iterations", self.power_iterations, 1)


@dataclass
class IECLConfig:
    """The ``iecl:`` block of a solo-learn configuration.

    The four weights have the paper's names (``lambda_`` is written ``lambda`` in a YAML). The
    paper gives no values; the defaults are ours and docs/defaults.md says how they were measured.

    Attributes:
        beta: weight of KL(p_phi || q).
        lambda_: weight of H(Z'), which is maximised.
        eta: weight of the encoder regulariser L_reg(f).
        gamma: weight of R(g_phi), half the squared norm of SAIB's weights.
        beta_warmup_epochs: epochs over which beta ramps up from 0.
        lambda_warmup_epochs: epochs over which lambda ramps up from 0.
        placement: where SAIB stands (paper, figure 3): none, query, anchor or both.
        query_views: large crops that are the query; null is every crop where the host has a
            momentum network (which holds the anchor) and crop 1 where it has none.
        saib_lr_multiplier: SAIB's learning rate over the host's.
    """

    beta: float = 0.01
    lambda_: float = 0.01
    eta: float = 0.01
    gamma: float = 1e-4
    beta_warmup_epochs: float = 0.0
    lambda_warmup_epochs: float = 0.0
    placement: str = "query"
    query_views: list[int] | None = None
    saib_lr_multiplier: float = 1.0
    saib: SAIBConfig = field(default_factory=SAIBConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)

    def __post_init__(self) -> None:
        for name in ("beta", "lambda_", "eta", "gamma"):
            _at_least(f"iecl.{name.rstrip('_')}", getattr(self, name), 0)
        for name in ("beta_warmup_epochs", "lambda_warmup_epochs", "saib_lr_multiplier"):
            _at_least(f"iecl.{name}", getattr(self, name), 0)
        _one_of("iecl.placement", self.placement, PLACEMENTS)


class IECL(Objective):
    """The IE-CL objective (arXiv 2603.12594), to be added to a host's loss.

    Args:
        config: the options.
        image_size: height and width of the large crops.
        views: how the host's views divide into query and anchor.
        network: the online network, whose layers ``L_reg`` is about. It is not kept.
        space: where the embeddings live; nothing here depends on it.

    Raises:
        IECLError: when an option does not fit the images or the views.

    Example:
        >>> views = Views(num_views=2, momentum=False, query=(1,))
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(7200, 16))
        >>> objective = IECL(IECLConfig(), 32, views, net, Space(16))
        >>> x = torch.randn(4, 3, 32, 32)
        >>> made = Made({0: net(x), 1: net(objective.transform(x, 1, "online"))})
        >>> sorted(objective.terms(made, epoch=0.0))
        ['entropy', 'kl']
        >>> sorted(objective.weight_terms(net))
        ['regularizer', 'saib_decay']
    """

    name = "iecl"
    Config = IECLConfig
    labels = {
        "kl": ("KL term", "nats"),
        "entropy": ("entropy term", "nats"),
        "regularizer": ("regulariser", ""),
        "saib_decay": ("decay of SAIB's weights", ""),
    }

    def __init__(
        self,
        config: IECLConfig,
        image_size: int,
        views: Views,
        network: nn.Module,
        space: Space,
    ) -> None:
        super().__init__()
        self.config = config
        self.views = views
        self.saib: SAIB | None = None
        if config.placement != "none":
            self.saib = SAIB(image_size, **config.saib.options())
        self.regularizer: SpectralRegularizer | None = None
        if config.eta > 0 and not self.parametrizes:
            self.regularizer = SpectralRegularizer(
                network,
                **asdict(config.regularizer),
                input_size=(3, image_size, image_size)
                if config.regularizer.norm == "convolution"
                else None,
            )

    @property
    def parametrizes(self) -> bool:
        return self.config.eta > 0 and self.config.regularizer.mode == "parametrize"

    @property
    def lr_multiplier(self) -> float:
        return self.config.saib_lr_multiplier

    def transform(self, x: Tensor, view: int, side: Side) -> Tensor:
        """g_phi(x) where SAIB stands, x elsewhere; (B, C, H, W) to the same, layout kept."""
        if side == "momentum":
            placed = self.config.placement in ("anchor", "both")
        elif view in self.views.query:
            placed = self.config.placement in ("query", "both")
        else:
            placed = self.config.placement in ("anchor", "both") and not self.views.momentum
        if self.saib is None or not placed:
            return x
        out = self.saib(x)
        if x.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        return out

    def terms(self, made: Made, epoch: float) -> dict[str, Term]:
        """KL and H(Z'), each with its weight; see the module's equation.

        Both are computed in float32 on L2-normalised embeddings whatever the autocast,
        and over the batches of all processes under DDP. Terms of weight 0 that cost little are
        computed without gradient, for the log.
        """
        c = self.config
        query, anchor = made.query_and_anchor(self.views)
        beta = c.beta * warmup(epoch, c.beta_warmup_epochs)
        lambda_ = c.lambda_ * warmup(epoch, c.lambda_warmup_epochs)
        with torch.autocast(query.device.type, enabled=False):
            z_query = estimators.all_gather_batch(F.normalize(query.float(), dim=-1))
            z_anchor = estimators.all_gather_batch(F.normalize(anchor.detach().float(), dim=-1))
            with torch.set_grad_enabled(beta > 0):
                kl = gaussian_kl(z_query, z_anchor, **asdict(c.kl))
            with torch.set_grad_enabled(lambda_ > 0):
                entropy = estimators.estimate(c.entropy.estimator, z_query, **c.entropy.options())
        return {"kl": Term(kl, beta), "entropy": Term(entropy, -lambda_)}

    def weight_terms(self, network: nn.Module) -> dict[str, Term]:
        """L_reg(f) of the online network and R(g_phi), each with its weight."""
        terms = {}
        if self.regularizer is not None:
            terms["regularizer"] = Term(self.regularizer(network), self.config.eta)
        if self.saib is not None:
            with torch.set_grad_enabled(self.config.gamma > 0):
                norm = torch.stack([p.square().sum() for p in self.saib.parameters()]).sum()
            terms["saib_decay"] = Term(norm / 2, self.config.gamma)
        return terms
