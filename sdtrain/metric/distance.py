"""How far two sets of pictures are apart, as functions of their features alone: no network, no state, no ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from sdtrain.metric.moments import Moments

_ROWS = 1024  # of a kernel matrix, at once


def fid(real: Moments, fake: Moments) -> float:
    """The Frechet distance (Heusel et al. 2017, equation 6) of any features; FID with Inception's.

    tr (S1 S2)^(1/2) is taken from the symmetric S1^(1/2) S2 S1^(1/2), whose eigenvalues are real and not negative.
    """
    values, vectors = torch.linalg.eigh(real.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0).sqrt().sum()
    mean = (real.mean - fake.mean).square().sum()
    return float(mean + real.covariance.trace() + fake.covariance.trace() - 2 * cross)


def kid(
    real: Tensor, fake: Tensor, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The unbiased MMD^2 with the kernel (x y / F + 1)^3 (Binkowski et al. 2018): mean and deviation over subsets."""
    if min(len(real), len(fake)) < subset_size or subset_size < 2:
        raise ValueError(f"kid: subsets of {subset_size} from {len(real)} and {len(fake)} features")
    real, fake = real.double(), fake.double()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num_subsets):
        x, y = (part[torch.randperm(len(part), generator=generator)[:subset_size]] for part in (real, fake))
        found.append(_unbiased(_cubic(x, x)) + _unbiased(_cubic(y, y)) - 2 * _cubic(x, y).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits: Tensor, num_splits: int = 10) -> tuple[float, float]:
    """exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016): mean and deviation over splits."""
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"inception_score: {num_splits} splits of {len(logits)} pictures")
    found = []
    for part in logits.double().chunk(num_splits):
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        found.append((p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp())
    values = torch.stack(found)
    return float(values.mean()), float(values.std()) if len(found) > 1 else 0.0


def cmmd(real: Tensor, fake: Tensor, sigma: float = 10.0) -> float:
    """1000 times the MMD^2 with a Gaussian kernel (Jayasumana et al. 2024), the biased form of their code.

    The features are CLIP's, of unit length.
    """
    real, fake = real.double(), fake.double()

    def mean(x: Tensor, y: Tensor) -> Tensor:
        rows = [torch.exp(-torch.cdist(p, y).square() / (2 * sigma**2)).sum() for p in x.split(_ROWS)]
        return torch.stack(rows).sum() / (len(x) * len(y))

    return float(1000 * (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake)))


def precision_recall(real: Tensor, fake: Tensor, num_neighbours: int = 3) -> tuple[float, float]:
    """The share of fakes within the real manifold, and of reals within the fake one (Kynkaanniemi et al. 2019).

    A manifold is the balls around its points that reach to their k-th nearest neighbour.
    """
    if min(len(real), len(fake)) <= num_neighbours:
        raise ValueError(f"precision_recall: {len(real)} and {len(fake)} features have no {num_neighbours} neighbours")
    real, fake = real.double(), fake.double()
    return _covered(fake, real, num_neighbours), _covered(real, fake, num_neighbours)


def _covered(points: Tensor, manifold: Tensor, num_neighbours: int) -> float:
    radii = torch.cat(
        [_distances(p, manifold).kthvalue(num_neighbours + 1, dim=1).values for p in manifold.split(_ROWS)]
    )  # the nearest is the point itself
    inside = [(_distances(p, manifold) <= radii).any(dim=1) for p in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # exact: a point is at 0 from itself


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _unbiased(kernel: Tensor) -> Tensor:
    """The mean over pairs of two different points."""
    num = len(kernel)
    return (kernel.sum() - kernel.trace()) / (num * (num - 1))
