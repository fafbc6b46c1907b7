"""IE-CL: L = L_host + beta KL(p_phi || q) - a Delta H - lambda H(Z') + eta L_reg(f) + gamma R(g).

Zhang et al., "Maximizing Incremental Information Entropy for Contrastive Learning", ICLR 2026,
arXiv 2603.12594. ``L_host`` is the host method's own loss and is not touched here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iecl_solo import checks
from iecl_solo import entropy as estimators
from iecl_solo.distributed import all_gather_batch, mean_over_processes, sum_over_processes
from iecl_solo.entropy import COVARIANCES, gaussian_kl
from iecl_solo.errors import IECLError
from iecl_solo.generation import log_det, patch_statistics
from iecl_solo.lipschitz import MODES, NORMS, SpectralRegularizer
from iecl_solo.objectives.protocol import Made, Objective, Side, Space, Term, Views, warmup
from iecl_solo.saib import BaseSAIB, NoiseSAIB, RandomStream, make_saib

PLACEMENTS = ("none", "query", "anchor", "both")
KL_SPACES = ("input", "embedding")
MEASURES = ("patch", "jacobian")
HOST_GRADIENTS = ("with", "without", "against")
REGULARIZERS = (*MODES, "parametrize")
# The modes of the regulariser that an option says anything to.
_OF_MODES = {
    "norm": ("penalty",),
    "power_iterations": ("penalty", "bilipschitz"),
    "sigma_min_floor": ("bilipschitz",),
}
#: What a budget can hold: the name of a logged value, and the sign of its change as steps grow.
HELD: Mapping[str, int] = {"agreement": -1, "patch_kl": 1}
#: The levels that each can reach: a mean cosine, a KL.
LEVELS: Mapping[str, tuple[float, float | None]] = {"agreement": (-1, 1), "patch_kl": (0, None)}
# A gradient of SAIB is at most this part of the weights it is of: see before_optimizer_step.
_CLIP = 0.02
# Images of each view at which log|det J| is taken: its gradient's noise is the probe's, and small.
_JACOBIAN_IMAGES = 16


@dataclass
class BudgetConfig:
    """The mean absolute step of a SAIB with noise: fixed, or found by the run.

    With ``hold`` it is a dual variable: after each step log(budget) moves by
    rate (measure - level), or its negative where a larger step raises the measure, so that the
    run settles where the measure is at its level, or at the nearer end of [min, max]. Under strong
    hand-made augmentations the views agree little without it and the budget shrinks.

    Attributes:
        start: the budget, or where it begins.
        min: the smallest one.
        max: the largest one.
        hold: what is held: a key of `HELD`, or "none", which leaves the budget where it begins.
        level: the value that it is held at.
        rate: how fast; log(budget) moves by this much a step at a difference of 1.
    """

    start: float = 0.05
    min: float = 0.01
    max: float = 0.3
    hold: str = "agreement"
    level: float = 0.7
    rate: float = 0.1

    def __post_init__(self) -> None:
        checks.one_of("iecl.saib.budget.hold", self.hold, ("none", *HELD))
        checks.number("iecl.saib.budget.rate", self.rate, 0)
        low, high = LEVELS.get(self.hold, (None, None))
        checks.number("iecl.saib.budget.level", self.level, low, high)
        if not 0 < self.min <= self.start <= self.max < math.inf:
            raise IECLError(
                f"iecl.saib.budget: min {self.min}, start {self.start}, max {self.max} given, "
                "allowed is 0 < min <= start <= max"
            )


@dataclass
class SAIBConfig:
    """The transform g_phi; see ``iecl_solo.saib`` for what each option does.

    ``null`` is the default of the variant's own class, and all that a variant without this option
    takes.

    Attributes:
        variant: paper, convex or noise.
        host_gradient: what the gradient of all that is computed of embeddings (the host's loss, and
            H(Z')) is to SAIB: it trains "with" it, "without" it, or "against" it (the gradient is
            reversed at SAIB's output; for the noise variant, whose step is bounded). ``null`` is
            "with" as in the paper, and "against" for noise.
        budget: of the noise variant.
    """

    variant: str = "paper"
    patch_size: int | None = None
    expansion: int | None = None
    depth: int | None = None
    activation: str | None = None
    positional_encoding: bool | None = None
    inner_skip: bool | None = None
    outer_skip: bool | None = None
    match_statistics: bool | None = None
    noise_channels: int | None = None
    host_gradient: str | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        if self.host_gradient is not None:
            checks.one_of("iecl.saib.host_gradient", self.host_gradient, HOST_GRADIENTS)
        if self.variant != NoiseSAIB.variant:
            if self.host_gradient == "against":
                raise IECLError(
                    "iecl.saib.host_gradient: against needs variant noise, whose budget bounds it; "
                    f"{self.variant} takes with and without"
                )
            if self.budget != BudgetConfig():
                raise IECLError(
                    f"iecl.saib.budget: only variant noise has one, {self.variant} was given"
                )

    def build(self, image_size: int) -> BaseSAIB:
        """The SAIB itself.

        >>> SAIBConfig(patch_size=8).build(32).options["outer_skip"]
        False
        """
        own = ("variant", "host_gradient", "budget")
        given = {k: v for k, v in vars(self).items() if k not in own and v is not None}
        if self.variant == NoiseSAIB.variant:
            given["budget"] = self.budget.start
        return make_saib(self.variant, image_size, **given)


@dataclass
class KLConfig:
    """The two distributions of KL(p_phi || q), each modelled as a Gaussian.

    Attributes:
        space: "input", as in the paper: p_phi is the law of the views that SAIB made (of their
            patches, see ``iecl_solo.generation``), q that of the raw views, and the gradient
            reaches SAIB alone. "embedding" compares the query's embeddings with the anchor's
            (``iecl_solo.entropy.gaussian_kl``), and is not the paper's: taken as it is, with the
            anchor detached, it makes the encoder contract. Shrinking both sides together does not
            change it, but its gradient says it did (0.44 a nat of log-scale at scale 1, growing as
            the inverse of the spread), and the embeddings' effective rank falls. So its gradient,
            too, reaches SAIB alone here, at the price of a second backward pass through the
            encoder.
        covariance: "full" or "diagonal"; ``null`` is full in input space, diagonal for embeddings.
        shrinkage: of "full" in embedding space; ``null`` is `gaussian_kl`'s own.
    """

    space: str = "input"
    covariance: str | None = None
    shrinkage: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("iecl.kl.space", self.space, KL_SPACES)
        if self.covariance is not None:
            checks.one_of("iecl.kl.covariance", self.covariance, COVARIANCES)
        if self.shrinkage is None:
            return
        checks.number("iecl.kl.shrinkage", self.shrinkage, 0, 1)
        if self.space == "input":
            raise IECLError("iecl.kl.shrinkage: only space embedding has one, input was given")
        if self.covariance != "full":
            given = self.covariance or "diagonal, the default for embeddings,"
            raise IECLError(f"iecl.kl.shrinkage: only covariance full has one, {given} was given")

    def of_embeddings(self, query: Tensor, anchor: Tensor) -> Tensor:
        """KL in nats per dimension of rows (B, d); the anchor is detached."""
        # in input space it is logged alone, to compare runs: one measure whatever the loss has
        given = self.covariance if self.space == "embedding" else None
        kl = gaussian_kl(query, anchor, covariance=given or "diagonal", shrinkage=self.shrinkage)
        return kl / query.shape[1]


@dataclass
class GenerationConfig:
    """Delta H of SAIB, which is maximised: the entropy that the views gain at the input.

    In nats per dimension, and beyond what a change of contrast gives (which a batch norm takes out
    again): weight 1 beside ``beta`` 1 is the point where partial whitening of the patches is
    best at Delta H 0.33 and a KL of 0.15 on CIFAR-10; only their ratio says where, see
    ``iecl_solo.generation.patch_statistics``.

    Attributes:
        weight: a; 0 is off.
        measure: "patch", of the patches as Gaussians; or "jacobian", E log|det J| of SAIB itself by
            a stochastic gradient (`iecl_solo.generation.log_det`), which costs more.
    """

    weight: float = 1.0
    measure: str = "patch"

    def __post_init__(self) -> None:
        checks.number("iecl.generation.weight", self.weight, 0)
        checks.one_of("iecl.generation.measure", self.measure, MEASURES)


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
        checks.one_of("iecl.entropy.estimator", self.estimator, tuple(estimators.ESTIMATORS))
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
    fold: bool = False

    def __post_init__(self) -> None:
        checks.one_of("iecl.regularizer.mode", self.mode, REGULARIZERS)
        checks.one_of("iecl.regularizer.norm", self.norm, NORMS)
        checks.whole("iecl.regularizer.power_iterations", self.power_iterations, 1)
        checks.number("iecl.regularizer.sigma_min_floor", self.sigma_min_floor, 0, 1, above=True)
        if self.fold and self.mode == "parametrize":
            raise IECLError("iecl.regularizer.fold: mode parametrize divides the kernel itself")
        for name, modes in _OF_MODES.items():
            given = getattr(self, name)
            if self.mode not in modes and given != getattr(RegularizerConfig, name):
                raise IECLError(
                    f"iecl.regularizer.{name}: {given} was given, but mode {self.mode} has no such "
                    f"option; {' and '.join(modes)} {'has' if len(modes) == 1 else 'have'} it"
                )


@dataclass
class IECLConfig:
    """The ``iecl:`` block of a solo-learn configuration.

    The four weights have the paper's names (``lambda_`` is written ``lambda`` in a YAML). The
    paper gives no values; the defaults are ours and docs/defaults.md says how they were measured.

    Attributes:
        beta: weight of KL(p_phi || q), in nats per dimension.
        lambda_: weight of H(Z'), which is maximised.
        eta: weight of the encoder regulariser L_reg(f).
        gamma: weight of R(g_phi), half the squared norm of SAIB's weights.
        beta_warmup_epochs: epochs over which beta ramps up from 0.
        lambda_warmup_epochs: epochs over which lambda ramps up from 0.
        placement: where SAIB stands (paper, figure 3): none, query, anchor or both. The KL of the
            input and the generation term train it wherever it stands. H(Z') is the query's, so on
            the anchor it trains the encoder alone; and on a momentum network's side neither H(Z')
            nor the host's loss has a gradient for it.
        query_views: large crops that are the query; null is every crop where the host has a
            momentum network (which holds the anchor) and crop 1 where it has none.
        saib_lr_multiplier: SAIB's learning rate over the host's.
    """

    beta: float = 1.0
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
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)

    def __post_init__(self) -> None:
        for name in ("beta", "lambda_", "eta", "gamma"):
            checks.number(f"iecl.{name.rstrip('_')}", getattr(self, name), 0)
        for name in ("beta_warmup_epochs", "lambda_warmup_epochs", "saib_lr_multiplier"):
            checks.number(f"iecl.{name}", getattr(self, name), 0)
        checks.one_of("iecl.placement", self.placement, PLACEMENTS)

    def trains_saib_on(self, views: Views) -> bool:
        """Whether a gradient but its own decay's can reach SAIB at its place in such views."""
        of_input = self.generation.weight > 0 or (self.beta > 0 and self.kl.space == "input")
        return of_input or not (self.placement == "anchor" and views.momentum)


class _Transformed(NamedTuple):
    """A large crop of this step: as it was, as SAIB made it, as the host got it, and the map."""

    raw: Tensor
    made: Tensor
    handed: Tensor
    realized: Callable[[Tensor], Tensor]


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return -grad[0]


def _centred(z: Tensor) -> Tensor:
    """Rows (B, d) in float32 less their mean over all processes."""
    z = z.float()
    total, count = sum_over_processes(z.sum(0), z.new_tensor(len(z)))
    return z - total / count


def agreement(made: Made, views: Views) -> Tensor:
    """Mean cosine similarity of the positive pairs: of a query and of another crop's anchor.

    Each crop's embeddings are taken less their mean over the batch (ours): those of an untrained
    or a collapsed encoder are all alike, and their plain cosine is near 1 whatever the views are.
    A pair of one crop counts only where there is no other. Without gradient; over all processes.

    >>> z = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> pair = Views(2, momentum=False, query=(1,))
    >>> round(agreement(Made({0: z, 1: z + 5}), pair).item(), 4)
    1.0
    """
    anchors = made.momentum if views.momentum else made.online
    queries = {v: z for v, z in made.online.items() if v in views.query}
    pairs = [(q, a) for q in queries for a in anchors if a in views.anchor]
    pairs = [(q, a) for q, a in pairs if q != a] or pairs
    if not pairs:
        raise IECLError("agreement: the host made no pair of a query and an anchor in this step")
    with torch.no_grad():
        query = {v: _centred(z) for v, z in queries.items()}
        anchor = {v: _centred(z) for v, z in anchors.items()}
        cosines = [F.cosine_similarity(query[q], anchor[a]) for q, a in pairs]
        return mean_over_processes(torch.cat(cosines).mean())


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
        ['entropy', 'generation', 'kl', 'patch_kl']
        >>> sorted(objective.weight_terms(net))
        ['regularizer', 'saib_decay']
    """

    name = "iecl"
    Config = IECLConfig
    labels = {
        "kl": ("KL of the embeddings", "nats per dimension"),
        "patch_kl": ("KL of the views' patches", "nats per dimension"),
        "generation": ("generation term", "nats per dimension"),
        "entropy": ("entropy term", "nats"),
        "regularizer": ("regulariser", ""),
        "saib_decay": ("decay of SAIB's weights", ""),
        "budget": ("SAIB's mean step", "deviations"),
    }
    shown = ("patch_kl", "generation", "entropy", "budget")
    query = "Z'"

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
        self.saib: BaseSAIB | None = None
        self.probes: RandomStream | None = None
        self._transformed: list[_Transformed] = []
        if config.placement != "none":
            if not config.trains_saib_on(views):
                raise IECLError(
                    "iecl.placement: anchor: on a host with a momentum network no gradient reaches "
                    "SAIB there; iecl.generation.weight above 0 or iecl.kl.space input with beta "
                    "above 0 gives it one, placement query and both have one"
                )
            self.saib = config.saib.build(image_size)
            if config.generation.weight > 0 and config.generation.measure == "jacobian":
                self.probes = RandomStream()
        self.regularizer: SpectralRegularizer | None = None
        if config.eta > 0 and not self.parametrizes:
            self.regularizer = SpectralRegularizer(
                network,
                **asdict(config.regularizer),
                input_size=(3, image_size, image_size)
                if config.regularizer.norm == "convolution" or config.regularizer.fold
                else None,
            )

    @property
    def parametrizes(self) -> bool:
        return self.config.eta > 0 and self.config.regularizer.mode == "parametrize"

    @property
    def transformer(self) -> BaseSAIB | None:
        return self.saib

    def divergence(self, query: Tensor, anchor: Tensor) -> Tensor:
        return self.config.kl.of_embeddings(query, anchor)

    @property
    def lr_multiplier(self) -> float:
        return self.config.saib_lr_multiplier

    @property
    def host_gradient(self) -> str:
        """with, without or against: as given, or as the variant has it."""
        assert self.saib is not None
        return self.config.saib.host_gradient or self.saib.host_gradient

    def is_placed(self, view: int, side: Side) -> bool:
        """Whether SAIB stands before this network for this large crop."""
        if self.saib is None:
            return False
        if side == "momentum":
            return self.config.placement in ("anchor", "both")
        if view in self.views.query:
            return self.config.placement in ("query", "both")
        return self.config.placement in ("anchor", "both") and not self.views.momentum

    def transform(self, x: Tensor, view: int, side: Side) -> Tensor:
        """g_phi(x) where SAIB stands, x elsewhere; (B, C, H, W) to the same, layout kept.

        In training the pair is kept for this step's terms.
        """
        if self.saib is None or not self.is_placed(view, side):
            return x
        if not self.training:
            return self._made(self.saib, x)
        # the momentum side runs without gradient, the terms of the input need one there too
        with torch.enable_grad():
            realized = self.saib.realize(x)
            made = self._made(realized, x)
        handed = made
        if self.host_gradient == "against":
            handed = _Reverse.apply(made)
        elif self.host_gradient == "without":
            handed = made.detach().requires_grad_(self._has_gradient_of_embedding_kl)
        self._transformed.append(_Transformed(x, made, handed, realized))
        return handed

    @staticmethod
    def _made(saib: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out = saib(x)
        if x.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        return out

    @property
    def _has_gradient_of_embedding_kl(self) -> bool:
        return self.config.kl.space == "embedding" and self.config.beta > 0

    def terms(self, made: Made, epoch: float) -> dict[str, Term]:
        """The KL, the generation term and H(Z'), each with its weight; see the module's equation.

        All are computed in float32 whatever the autocast, and over the batches of all processes
        under DDP (log|det J|, a mean over images, over each one's own). KL and Delta H are in nats
        per dimension, H(Z') in nats, of L2-normalised embeddings. Terms of weight 0 that cost
        little are computed without gradient, for the log; so are ``agreement`` and ``budget`` of a
        SAIB with noise, whose budget moves here.
        """
        c = self.config
        seen, self._transformed = self._transformed, []
        query, anchor = made.query_and_anchor(self.views)
        beta = c.beta * warmup(epoch, c.beta_warmup_epochs)
        lambda_ = c.lambda_ * warmup(epoch, c.lambda_warmup_epochs)
        of_embeddings = beta if c.kl.space == "embedding" and seen else 0.0
        with torch.autocast(query.device.type, enabled=False):
            z_query = all_gather_batch(F.normalize(query.float(), dim=-1))
            z_anchor = all_gather_batch(F.normalize(anchor.detach().float(), dim=-1))
            with torch.set_grad_enabled(of_embeddings > 0):
                kl = c.kl.of_embeddings(z_query, z_anchor)
                if of_embeddings > 0:
                    kl = _to_saib_alone(kl, seen)
            with torch.set_grad_enabled(lambda_ > 0):
                entropy = estimators.estimate(c.entropy.estimator, z_query, **c.entropy.options())
            terms = {"kl": Term(kl, of_embeddings), "entropy": Term(entropy, -lambda_)}
            if seen:
                terms |= self._input_terms(seen, beta if c.kl.space == "input" else 0.0)
        if isinstance(self.saib, NoiseSAIB):
            terms["agreement"] = Term(agreement(made, self.views), 0.0)
            terms["budget"] = Term(self.saib.log_budget.detach().exp(), 0.0)
            if self.training and c.saib.budget.hold in terms:
                self._move_budget(self.saib, terms[c.saib.budget.hold].value)
        return terms

    def _input_terms(self, seen: list[_Transformed], beta: float) -> dict[str, Term]:
        """``patch_kl`` and ``generation``, of all that SAIB made in this step."""
        assert self.saib is not None
        weight = self.config.generation.weight
        covariance = self.config.kl.covariance if self.config.kl.space == "input" else None
        with torch.set_grad_enabled(weight > 0 or beta > 0):
            patches = patch_statistics(
                [s.raw for s in seen],
                [s.made for s in seen],
                self.saib.patch_size,
                covariance=covariance or "full",
            )
            gained = patches.beyond_contrast
            if self.probes is not None:
                gained = self._log_det(seen) - patches.contrast
        return {"patch_kl": Term(patches.kl, beta), "generation": Term(gained, -weight)}

    def _log_det(self, seen: list[_Transformed]) -> Tensor:
        """E log|det J| of SAIB in nats per dimension, at this process's images."""
        assert self.saib is not None and self.probes is not None
        values = []
        for s in seen:
            x = s.raw[:_JACOBIAN_IMAGES].float()
            generator = self.probes.next(x.device)
            # of a SAIB with noise at one draw of it: the map of an image, not the law of its views
            saib = self.saib.realize(x)
            values.append(log_det(saib, x, generator=generator) / x[0].numel())
        return torch.cat(values).mean()

    @torch.no_grad()
    def _move_budget(self, saib: NoiseSAIB, value: Tensor) -> None:
        b = self.config.saib.budget
        missing = HELD[b.hold] * (b.level - value.detach())
        # a step that is not finite is one that a gradient scaler skips
        moved = saib.log_budget + b.rate * missing.nan_to_num(0, 0, 0)
        saib.log_budget.copy_(moved.clamp(math.log(b.min), math.log(b.max)))

    def weight_terms(self, network: nn.Module) -> dict[str, Term]:
        """L_reg(f) of the online network and R(g_phi), each with its weight.

        This is the first call of a step: what a step that failed has left is forgotten.
        """
        self._transformed = []
        terms = {}
        if self.regularizer is not None:
            terms["regularizer"] = Term(self.regularizer(network), self.config.eta)
        if self.saib is not None:
            with torch.set_grad_enabled(self.config.gamma > 0):
                norm = torch.stack([p.square().sum() for p in self.saib.parameters()]).sum()
            terms["saib_decay"] = Term(norm / 2, self.config.gamma)
        return terms

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Clip the gradient of each of SAIB's tensors at 2 % of the tensor's norm, or of norm 1.

        SAIB learns by the host's optimiser and rate, which are made for the encoder. The gradient
        of a log-determinant goes with the inverse of the smallest variances: at the rates of SGD
        (0.05 to 1) 300 steps of the generation term alone end at a Delta H of -1 to -2 nats per
        dimension, and with this at 0.31. Adaptive gradient clipping (Brock et al. 2021), by tensor.
        """
        for p in self.saib.parameters() if self.saib is not None else ():
            if p.grad is not None:
                limit = _CLIP * p.norm().clamp(min=1)
                # the minimum, not a clamp: a gradient that is not finite has to stay so
                p.grad.mul_(torch.minimum(limit / p.grad.norm(), limit.new_ones(())))


def _to_saib_alone(value: Tensor, seen: list[_Transformed]) -> Tensor:
    """The same value, whose gradient reaches what SAIB made, and no weight of the network."""
    reached = [s for s in seen if s.handed.requires_grad]
    gradients = torch.autograd.grad(
        value, [s.handed for s in reached], retain_graph=True, allow_unused=True
    )
    out = value.detach()
    for s, gradient in zip(reached, gradients, strict=True):
        if gradient is not None:
            linear = (gradient * s.made).sum()
            out = out + (linear - linear.detach())
    return out
