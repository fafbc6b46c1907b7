"""CLIMB: L = L_host + beta H(Z), the entropy of the representation minimised.

Li et al., "Contrastive Learning via Variational Information Bottleneck", TPAMI 2025,
doi 10.1109/TPAMI.2025.3571990: keep what predicts the other view, drop the rest. H(Z) is bounded
by E[-log r(z)] with a density r that is learned along with the rest; ``L_host`` is the host
method's own loss and is not touched here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from iecl_solo import checks
from iecl_solo.distributed import all_gather_batch
from iecl_solo.entropy import coding_rate
from iecl_solo.errors import IECLError
from iecl_solo.losses.climb import PrototypeMarginal, VMFMixture
from iecl_solo.objectives.protocol import Made, Objective, Space, Term, Views, of_views, warmup

#: Each marginal's default beta. A non-contrastive host loses its rank to ten times vmf's.
MARGINALS = {"vmf": 0.003, "prototypes": 0.03}


@dataclass
class CLIMBConfig:
    """The ``climb:`` block of a solo-learn configuration.

    The paper's marginal and weights are not public; all of this is ours, and docs/climb.md says
    how it was measured.

    Attributes:
        beta: weight of the bound on H(Z); of an embedding's in nats per dimension, so that one
            value serves every width, of a code's over prototypes in nats. null is 0.003 and 0.03.
            At 0 nothing is learned or added.
        beta_warmup_epochs: epochs over which beta ramps up from 0; r is learned from the start.
        marginal: vmf, a mixture of von Mises-Fisher densities over normalised embeddings;
            prototypes, a distribution over the host's prototypes; null is prototypes for a host
            that has them (DINO) and vmf for the others.
        num_components: K of the mixture.
        max_concentration: what the mixture's concentrations stay below, as a multiple of the
            embedding's dimension: how small a spread still counts as entropy.
        lr_multiplier: the marginal's learning rate over the host's.
        views: large crops whose online embeddings are Z; null is all of them.
    """

    beta: float | None = None
    beta_warmup_epochs: float = 0.0
    marginal: str | None = None
    num_components: int = 64
    max_concentration: float = 10.0
    lr_multiplier: float = 1.0
    views: list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "beta_warmup_epochs", "lr_multiplier"):
            if (value := getattr(self, name)) is not None:
                checks.number(f"climb.{name}", value, 0)
        checks.whole("climb.num_components", self.num_components, 1)
        checks.number("climb.max_concentration", self.max_concentration, 0, above=True)
        if self.marginal is not None:
            checks.one_of("climb.marginal", self.marginal, MARGINALS)


class CLIMB(Objective):
    """The CLIMB objective (doi 10.1109/TPAMI.2025.3571990), to be added to a host's loss.

    Args:
        config: the options.
        image_size: height and width of the large crops; nothing here depends on it.
        views: the host's views.
        network: the online network; nothing here depends on it.
        space: where the embeddings live, and the host's prototypes if it has any.

    Raises:
        IECLError: when an option does not fit the host.

    Example:
        >>> views = Views(num_views=2, momentum=False, query=(1,))
        >>> objective = CLIMB(CLIMBConfig(), 32, views, nn.Identity(), Space(16))
        >>> made = Made({0: torch.randn(4, 16), 1: torch.randn(4, 16)})
        >>> sorted(objective.terms(made, epoch=0.0))
        ['coding_rate', 'entropy_bound', 'fit']
    """

    name = "climb"
    Config = CLIMBConfig
    labels = {
        "entropy_bound": ("upper bound on H(Z)", "nats"),
        "coding_rate": ("coding rate of Z", "nats"),
    }
    shown = ("entropy_bound", "coding_rate")

    def __init__(
        self,
        config: CLIMBConfig,
        image_size: int,
        views: Views,
        network: nn.Module,
        space: Space,
    ) -> None:
        super().__init__()
        self.config = config
        self.views = views
        given = range(views.num_views) if config.views is None else config.views
        self.crops = tuple(sorted(set(given)))
        if not self.crops or not set(self.crops) <= set(range(views.num_views)):
            raise IECLError(
                f"climb.views: {config.views} given, allowed are 0 to {views.num_views - 1}"
            )
        self.marginal: VMFMixture | PrototypeMarginal | None = None
        kind = config.marginal or ("vmf" if space.num_prototypes is None else "prototypes")
        if kind == "prototypes" and space.num_prototypes is None:
            raise IECLError("climb.marginal: 'prototypes' is for DINO; this host has none, use vmf")
        self.beta = MARGINALS[kind] if config.beta is None else config.beta
        if self.beta == 0:
            return
        if space.num_prototypes is not None and kind == "prototypes":
            self.marginal = PrototypeMarginal(space.num_prototypes, temperature=space.temperature)
        else:
            self.marginal = VMFMixture(
                space.dim,
                config.num_components,
                max_concentration=config.max_concentration * space.dim,
            )

    @property
    def lr_multiplier(self) -> float:
        return self.config.lr_multiplier

    def terms(self, made: Made, epoch: float) -> dict[str, Term]:
        """The bound on H(Z), what fits r to Z, and Z's coding rate for the log.

        ``entropy_bound`` moves the networks and not r; ``fit`` moves r and not the networks, at a
        pace that does not depend on beta. Under DDP the processes' gradients average to that of the
        whole batch: the bound is a mean over it, and the fit takes all processes' rows.
        ``coding_rate`` is over the batches of all processes: IE-CL's H(Z') by its default
        estimator, to compare with. All in float32, whatever the autocast.
        """
        z = of_views(made.online, self.crops)
        terms = {"coding_rate": Term(self._coding_rate(z), 0.0)}
        if self.marginal is None:
            return terms
        beta = self.beta * warmup(epoch, self.config.beta_warmup_epochs)
        if isinstance(self.marginal, PrototypeMarginal):
            z, weight = of_views(made.scores, self.crops), beta
        else:
            weight = beta / z.shape[1]
        held = {name: p.detach() for name, p in self.marginal.named_parameters()}
        with torch.set_grad_enabled(weight > 0):
            bound = -functional_call(self.marginal, held, z).mean()
        terms["entropy_bound"] = Term(bound, weight)
        terms["fit"] = Term(self.marginal.fitting_loss(z), 1.0, logged=False)
        return terms

    @torch.no_grad()
    def _coding_rate(self, z: Tensor) -> Tensor:
        return coding_rate(all_gather_batch(F.normalize(z.float(), dim=-1)))
