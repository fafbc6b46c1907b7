"""Measures of a representation that need no label, by their published definitions.

All are of features (N, d), one row an image; alignment and LiDAR also need several views of each.
None looks at labels, and none is chosen on anything. Higher is better for RankMe and LiDAR, lower
for uniformity and alignment; alpha-ReQ is best near 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from iecl_solo.entropy import effective_rank
from iecl_solo.errors import IECLError

#: Of each measure, whether more is better (1), less (-1), or neither (0).
BETTER = {"rankme": 1, "lidar": 1, "alpha_req": 0, "uniformity": -1, "alignment": -1}

#: Rows of a block of pairwise distances.
_BLOCK = 2048


def _matrix(features: Tensor, least: int, dims: int = 2) -> Tensor:
    if features.dim() != dims or features.shape[0] < least:
        wanted = "(N, d)" if dims == 2 else "(N, views, d)"
        raise IECLError(
            f"features of shape {tuple(features.shape)}: {wanted} with N >= {least} is needed"
        )
    return features.detach().double()


def _perplexity(spectrum: Tensor, eps: float) -> float:
    """exp of the entropy of a spectrum divided by its sum, plus eps in each place."""
    p = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny) + eps
    return float(torch.exp(-(p * p.log()).sum()))


def rankme(features: Tensor) -> float:
    """Effective rank by the singular values: exp(-sum p ln p), p = sigma / sum(sigma) + 1e-7.

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank", ICML 2023, arXiv 2210.02885, equations 1 and 2. The matrix is
    not centred. The authors take 25,600 images.

    Args:
        features: (N, d), N >= 2.

    Returns:
        Between 1 (collapsed to a line) and min(N, d).

    Raises:
        IECLError: for another shape.

    Example:
        >>> round(rankme(torch.eye(4)), 3), round(rankme(torch.ones(4, 3)), 3)
        (4.0, 1.0)
    """
    return float(effective_rank(_matrix(features, 2)))


def lidar(features: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> float:
    """Effective rank of linear discriminant analysis with each image as a class of its own.

    Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL
    Architectures", ICLR 2024, arXiv 2312.04000, section 4: with Sigma_b the covariance of the
    images' means and Sigma_w that of the views around them plus delta I, the perplexity of the
    eigenvalues of Sigma_w^(-1/2) Sigma_b Sigma_w^(-1/2). A direction counts as far as the images
    differ along it by more than their views do.

    Args:
        features: (N, q, d), q >= 2 views of each image; the paper has N of 1,000 and q of 50.
        delta: the paper's 1e-4.
        eps: as in RankMe.

    Raises:
        IECLError: for another shape, or a single view.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = torch.eye(3).repeat(20, 1)
        >>> views = images[:, None] + 0.01 * torch.randn(60, 4, 3, generator=generator)
        >>> round(lidar(views), 1)  # three means span a plane
        2.0
    """
    x = _matrix(features, 2, dims=3)
    images, views, dim = x.shape
    if views < 2:
        raise IECLError(f"LiDAR of {views} view an image: at least 2 are needed")
    means = x.mean(1)
    between = torch.cov(means.T).reshape(dim, dim)
    around = (x - means[:, None]).flatten(0, 1)
    within = around.T @ around / (images * (views - 1)) + delta * torch.eye(dim).to(x)
    values, vectors = torch.linalg.eigh(within)
    whitening = vectors * values.rsqrt()
    spectrum = torch.linalg.eigvalsh(whitening.T @ between @ whitening).clamp_min(0)
    return _perplexity(spectrum, eps)


def alpha_req(features: Tensor, ranks: tuple[int, int] = (3, 100)) -> float:
    """Decay of the covariance's spectrum: alpha of eigenvalue_j ~ j^(-alpha).

    Agrawal et al., "alpha-ReQ: Assessing Representation Quality in Self-Supervised Learning by
    Measuring Eigenspectrum Decay", NeurIPS 2022: the least-squares slope of log eigenvalue over
    log rank. Good representations are near 1; a collapsed one decays faster. The paper leaves the
    first eigenvalues out and does not fix the range; ours is the 3rd to the 100th, or as many as
    are above rounding.

    Args:
        features: (N, d).
        ranks: first and last rank of the fit, counted from 1.

    Returns:
        NaN where fewer than two eigenvalues are left.

    Raises:
        IECLError: for another shape.

    Example:
        >>> spectrum = torch.arange(1, 21).double() ** -0.5  # of deviations: variances fall as 1/j
        >>> x = torch.cat([torch.diag(spectrum), -torch.diag(spectrum)])
        >>> round(alpha_req(x), 3)
        1.0
    """
    x = _matrix(features, 2)
    variances = torch.linalg.svdvals(x - x.mean(0)).square() / (len(x) - 1)
    told = variances > variances[0] * max(x.shape) * torch.finfo(x.dtype).eps
    last = min(ranks[1], int(told.sum()))
    if last - ranks[0] < 1:
        return math.nan
    y = variances[ranks[0] - 1 : last].log()
    t = torch.arange(ranks[0], last + 1).to(x).log()
    t, y = t - t.mean(), y - y.mean()
    return -float((t @ y) / (t @ t))


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """How evenly normalised features cover the sphere: ln E exp(-t |x - y|^2) over pairs.

    Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020, arXiv 2005.10242, section 4. In nats: 0 where all are
    one point, lower is more even.

    Args:
        features: (N, d); each row is divided by its length.
        t: the paper's 2.

    Raises:
        IECLError: for another shape or a single row.

    Example:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])), 3)  # two opposite points
        -8.0
    """
    x = F.normalize(_matrix(features, 2), dim=1)
    total = x.new_zeros(())
    for start in range(0, len(x), _BLOCK):
        part = x[start : start + _BLOCK]
        squared = (2 - 2 * part @ x.T).clamp_min(0)
        total += torch.exp(-t * squared).sum() - len(part)  # each row's pair with itself is exp(0)
    # of the rounded pair with itself, what is not 1 is below 1e-15 and has been taken off as 1
    return float((total / (len(x) * (len(x) - 1))).log())


def alignment(features: Tensor, alpha: float = 2.0) -> float:
    """How near two views of an image are: E |x - y|^alpha of their normalised features.

    Wang and Isola 2020, as above. 0 where views of an image coincide, lower is better.

    Args:
        features: (N, q, d), q >= 2 views of each image; the mean is over all pairs of views.
        alpha: the paper's 2.

    Raises:
        IECLError: for another shape, or a single view.

    Example:
        >>> round(alignment(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])), 6)
        2.0
    """
    x = F.normalize(_matrix(features, 1, dims=3), dim=2)
    views = x.shape[1]
    if views < 2:
        raise IECLError(f"alignment of {views} view an image: at least 2 are needed")
    first, second = torch.triu_indices(views, views, offset=1)
    return float((x[:, first] - x[:, second]).norm(dim=2).pow(alpha).mean())


def label_free(features: Tensor, views: Tensor) -> dict[str, float]:
    """All of the above, by name.

    Args:
        features: (N, d), of the images as evaluation shows them.
        views: (M, q, d), of q augmented views of each of M images.
    """
    return {
        "rankme": rankme(features),
        "lidar": lidar(views),
        "alpha_req": alpha_req(features),
        "uniformity": uniformity(features),
        "alignment": alignment(views),
    }
