"""CLIMB's variational bound on the entropy of a representation: H(Z) <= E[-log r(z)] for any r.

Li et al., "Contrastive Learning via Variational Information Bottleneck", TPAMI 2025,
doi 10.1109/TPAMI.2025.3571990, which is silent on r. The two densities r here are ours, and so is
the way they are learned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from iecl_solo import checks
from iecl_solo.distributed import mean_over_processes
from iecl_solo.entropy import checked_rows, log_vmf_normalizer
from iecl_solo.precision import full_precision, in_full_precision

__all__ = ["PrototypeMarginal", "VMFMixture", "entropy_bound"]


def _of_all_processes(mean: Tensor) -> Tensor:
    """The mean over all processes' rows of a mean over this one's, with this one's gradient.

    Averaged over the processes, as DistributedDataParallel does, it is the gradient of all rows.
    """
    return mean_over_processes(mean) + _only_gradient(mean)


def _only_gradient(loss: Tensor) -> Tensor:
    """0, with the gradient of ``loss``."""
    return loss - loss.detach()


def _relative(value: Tensor, target: Tensor) -> Tensor:
    """Their difference over the larger of the two, both >= 0: within -1 and 1."""
    return (value - target) / torch.maximum(value, target).clamp(min=1e-30)


def _weights_loss(logits: Tensor, share: Tensor) -> Tensor:
    """What moves softmax(logits) to ``share`` at a pace that depends on neither.

    The gradient of the cross-entropy is ``weight - share``, of order 1/K; it is rescaled here.
    """
    gradient = _relative(logits.detach().softmax(0), share)
    return _only_gradient((gradient * logits).sum())


def _products(rows: Tensor, others: Tensor) -> Tensor:
    return einsum(rows, others, "b d, k d -> b k")


class VMFMixture(nn.Module):
    """A learned density on the unit sphere: a mixture of von Mises-Fisher densities.

    r(z) = sum_k w_k C_d(kappa_k) exp(kappa_k mu_k^T z), with respect to the sphere's surface
    measure (a vMF mixture: Banerjee et al. 2005; as CLIMB's marginal: ours). It begins as random
    directions of small concentration, near the uniform density.

    Args:
        dim: d, >= 2.
        num_components: K, >= 1.
        max_concentration: what the concentrations stay below, > 0. A density without a limit makes
            the entropy of collapsing embeddings go to minus infinity; with it nothing is gained by
            being narrower than about ``sqrt(d / max_concentration)``.

    Attributes:
        means: (K, d), normalised in use.
        log_concentration: (K,), of the concentrations before the limit.
        logits: (K,), of the weights.

    Raises:
        IECLError: an argument is out of range.

    Example:
        >>> mixture = VMFMixture(3, num_components=1)
        >>> with torch.no_grad():
        ...     _ = mixture.log_concentration.fill_(-20)  # as good as uniform
        >>> z = F.normalize(torch.randn(5, 3))
        >>> mixture.log_prob(z).exp() * 4 * math.pi  # the sphere's area
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000], grad_fn=<MulBackward0>)
    """

    def __init__(
        self, dim: int, num_components: int = 64, *, max_concentration: float = math.inf
    ) -> None:
        super().__init__()
        checks.whole("dim", dim, 2)
        checks.whole("num_components", num_components, 1)
        checks.number("max_concentration", max_concentration, 0, above=True, infinite=True)
        self.dim = dim
        self.max_concentration = max_concentration
        self.means = nn.Parameter(F.normalize(torch.randn(num_components, dim), dim=-1))
        # sqrt(d): a direction's product with a mean is of order 1/sqrt(d), so that at first no
        # component is out of any embedding's reach
        self.log_concentration = nn.Parameter(torch.full((num_components,), 0.5 * math.log(dim)))
        self.logits = nn.Parameter(torch.zeros(num_components))

    @property
    def concentrations(self) -> Tensor:
        """kappa_k, (K,): exp(log_concentration), smoothly held below max_concentration."""
        raw = self.log_concentration
        return (raw - F.softplus(raw - math.log(self.max_concentration))).exp()

    def _log_joint(self, cosines: Tensor) -> Tensor:
        """log w_k + log density of component k, (B, K), from mu_k^T z."""
        kappa = self.concentrations
        log_density = log_vmf_normalizer(self.dim, kappa) + kappa * cosines
        return self.logits.log_softmax(0) + log_density

    def _cosines(self, z: Tensor) -> Tensor:
        means = F.normalize(self.means, dim=-1).to(z.dtype)
        return in_full_precision(_products, F.normalize(z, dim=-1, eps=1e-6), means)

    def log_prob(self, z: Tensor) -> Tensor:
        """log r(z) in nats, (B, d) to (B,).

        Args:
            z: rows (B, d), any floating dtype, on the module's device; normalised inside. Half
                precision is lifted to float32, whatever the autocast.

        Returns:
            float64 for float64 and float32 otherwise. Differentiable in z and in the parameters.

        Raises:
            IECLError: z is not (B, d) floating.

        Cost: O(B K d).
        """
        z = checked_rows(z, width=self.dim)
        with full_precision(z.device):
            return self._log_joint(self._cosines(z)).logsumexp(1)

    def forward(self, z: Tensor) -> Tensor:
        """``log_prob``."""
        return self.log_prob(z)

    def fitting_loss(self, z: Tensor) -> Tensor:
        """A loss whose gradient fits the parameters to the rows; its value is 0.

        The gradient of the negative log-likelihood, each entry (each direction, for the means)
        times a positive number that makes it of order 1 at most, and its curvature too: one
        learning rate then serves every d, K and concentration (ours). It is one step of EM's
        M-step: a component is moved by the mean over the rows it answers for, not by its share of
        the mean over all rows; concentrations and weights move by ratios.

        Args:
            z: rows (B, d) as for ``log_prob``; no gradient reaches them. Under several processes
                as many in each: the parameters are fitted to all of them.

        Returns:
            A 0-dim tensor. Its gradient, averaged over the processes, is that of all rows.
        """
        z = checked_rows(z.detach(), width=self.dim)
        with full_precision(z.device):
            cosines = self._cosines(z)
            responsibility = self._log_joint(cosines).detach().softmax(1)
            # of all processes' rows: nothing below is linear in them
            share = mean_over_processes(responsibility.mean(0))
            # a component with few rows learns slowly rather than from next to nothing
            pace = share / share.clamp(min=1 / len(self.logits))
            mean_cosine = _of_all_processes((responsibility * cosines).mean(0))
            mean_cosine = mean_cosine / share.clamp(min=1e-30)
            length = mean_cosine.detach().clamp(0, 1)
            # both lengths as concentrations, where one step is as good as another
            excess = _relative(self._concentration(self._lengths()), self._concentration(length))
            loss = pace * (excess * self.concentrations.log() - mean_cosine)
            return _weights_loss(self.logits, share) + _only_gradient(loss.sum())

    def _lengths(self) -> Tensor:
        """Mean resultant length A_d(kappa_k) of each component, (K,), without gradient."""
        kappa = self.concentrations.detach().requires_grad_()
        with torch.enable_grad():
            log_normalizer = log_vmf_normalizer(self.dim, kappa).sum()
        return -torch.autograd.grad(log_normalizer, kappa)[0]

    def _concentration(self, length: Tensor) -> Tensor:
        """About the concentration of that mean resultant length: Banerjee et al. 2005, eq. 4.4."""
        squared = length.square()
        return length * (self.dim - squared) / (1 - squared).clamp(min=1e-6)


class PrototypeMarginal(nn.Module):
    """A learned distribution r over K prototypes, for codes that are distributions over them.

    The code of an image is p(k | x) = softmax(scores / temperature)_k, DINO's student. Its entropy
    over the images, H(Z) = -sum_k p(k) log p(k) with p(k) = E p(k | x), is at most
    E[-sum_k p(k | x) log r_k], and that is H(Z) for r = p (CLIMB; r over prototypes: ours). It
    begins uniform, where the bound is log K for every code.

    Args:
        num_prototypes: K, >= 2.
        temperature: of the codes, > 0.

    Attributes:
        logits: (K,), of r.

    Raises:
        IECLError: an argument is out of range.

    Example:
        >>> marginal = PrototypeMarginal(4)
        >>> round(entropy_bound(torch.randn(8, 4), marginal).item(), 4)  # log 4
        1.3863
    """

    def __init__(self, num_prototypes: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        checks.whole("num_prototypes", num_prototypes, 2)
        checks.number("temperature", temperature, 0, above=True)
        self.temperature = temperature
        self.logits = nn.Parameter(torch.zeros(num_prototypes))

    def _codes(self, scores: Tensor) -> Tensor:
        scores = checked_rows(scores, "scores", width=len(self.logits))
        return (scores / self.temperature).softmax(1)

    def log_prob(self, scores: Tensor) -> Tensor:
        """sum_k p(k | x) log r_k in nats, (B, K) to (B,): the mean of log r over the row's code.

        Args:
            scores: rows (B, K) of prototypes' scores before the softmax, any floating dtype. Half
                precision is lifted to float32, whatever the autocast.

        Raises:
            IECLError: scores is not (B, K) floating.
        """
        with full_precision(scores.device):
            codes = self._codes(scores)
            log_r = self.logits.log_softmax(0).to(codes.dtype)
            return in_full_precision(_products, codes, log_r[None]).squeeze(1)

    def forward(self, scores: Tensor) -> Tensor:
        """``log_prob``."""
        return self.log_prob(scores)

    def fitting_loss(self, scores: Tensor) -> Tensor:
        """A loss whose gradient fits r to the mean code; its value is 0.

        The gradient of the bound, rescaled to order 1 whatever K (ours). None reaches the scores.
        Under several processes, as many rows in each, the mean is over all of them.
        """
        with full_precision(scores.device):
            codes = self._codes(scores.detach())
            return _weights_loss(self.logits, mean_over_processes(codes.mean(0)))


def entropy_bound(z: Tensor, marginal: VMFMixture | PrototypeMarginal) -> Tensor:
    """CLIMB's upper bound on H(Z): E[-log r(z)] over the rows, in nats.

    In expectation it exceeds H(Z) by KL(p || r), so it is H(Z) when r is the law p of z. On the
    rows that r was fitted to it can come out lower, as any in-sample likelihood.

    Args:
        z: what the marginal's ``log_prob`` takes: embeddings (B, d), or scores (B, K).
        marginal: r.

    Returns:
        A 0-dim tensor, float64 for float64 and float32 otherwise. Differentiable in z and in r.

    Raises:
        IECLError: z is not of the marginal's shape.

    Example:
        >>> mixture = VMFMixture(2, num_components=1)
        >>> with torch.no_grad():
        ...     _ = mixture.log_concentration.fill_(-20)
        >>> round(entropy_bound(torch.randn(8, 2), mixture).item(), 4)  # log(2 pi)
        1.8379
    """
    return -marginal.log_prob(z).mean()
