"""How far one set of pictures is from another, by their features.

Features are float [n, d], a picture a row. The Frechet distance and the kernel distance are clean-fid's; with
Inception's features they are called FID and KID, and with others they are not.
"""

from dataclasses import dataclass

import numpy as np

from megatron_codec.errors import UserError
from megatron_codec.evaluation.packages import clean_fid

_SUBSET = 1000  # pictures of a subset of the kernel distance, in clean-fid


@dataclass(frozen=True)
class Distances:
    """Of a set of pictures from the real ones.

    Attributes:
        frechet: between normal distributions with their means and covariances (Heusel et al., 2017).
        kernel: squared maximum mean discrepancy with the cubic kernel (Binkowski et al., 2018), without bias,
            so that it may be a little below 0.
        precision: share of the pictures that lie where the real ones do.
        recall: share of the real ones that lie where the pictures do.
    """

    frechet: float
    kernel: float
    precision: float
    recall: float


def compare(real: np.ndarray, made: np.ndarray, neighbours: int = 3) -> Distances:
    """All distances of `made` [m, d] from `real` [n, d].

    Args:
        neighbours: of precision and recall.

    Raises:
        UserError: there are too few pictures, the two have features of different number, or some are not
            finite.
    """
    check_features(real, made, neighbours)
    # In fp32 the difference of large sums would lose the digits that matter.
    real, made = real.astype(np.float64), made.astype(np.float64)
    precision, recall = precision_recall(real, made, neighbours)
    return Distances(frechet(real, made), kernel(real, made), precision, recall)


def check_features(real: np.ndarray, made: np.ndarray, neighbours: int) -> None:
    """Raises UserError where `compare` cannot be computed."""
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise UserError(
            f"features {list(real.shape)} and {list(made.shape)}",
            "must be two tables with the same number of columns",
            "take both from the same extractor",
        )
    least = max(2, neighbours + 1)
    if min(len(real), len(made)) < least:
        raise UserError(
            f"{min(len(real), len(made))} pictures",
            f"are too few: a covariance and {neighbours} neighbours of each need at least {least}",
            "give more",
        )
    for name, features in (("real", real), ("made", made)):
        if not np.isfinite(features).all():
            raise UserError(f"features of the {name} pictures", "must be finite", "check the extractor")


def frechet(real: np.ndarray, made: np.ndarray) -> float:
    """clean-fid's where both sets have more pictures than features; else `frechet_svd`, which needs no
    square root of a singular matrix."""
    if min(len(real), len(made)) <= real.shape[1]:
        return frechet_svd(real, made)
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, made)]
    return float(clean_fid("fid").frechet_distance(*moments[0], *moments[1]))


def frechet_svd(real: np.ndarray, made: np.ndarray) -> float:
    """The same distance for any number of pictures, from singular values.

    With A and B the centred features over sqrt(n - 1), the covariances are A'A and B'B, and the non-zero
    eigenvalues of their product are the squares of the singular values of AB', so the trace of its root is
    their sum.
    """
    means, factors = [], []
    for x in (real, made):
        means.append(x.mean(axis=0))
        factors.append((x - means[-1]) / np.sqrt(len(x) - 1))
    traces = sum(float((factor**2).sum()) for factor in factors)
    # A = QR with orthonormal Q: R alone gives the same singular values and is no larger than [d, d].
    small = [np.asarray(np.linalg.qr(a, mode="r")) if len(a) > a.shape[1] else a for a in factors]
    root = np.linalg.svd(small[0] @ small[1].T, compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * root)


def kernel(real: np.ndarray, made: np.ndarray, seed: int = 0) -> float:
    """clean-fid's kernel distance: the mean over 100 subsets of at most 1,000 pictures, drawn from `seed`."""
    # Where a subset is all that there is, 99 of the 100 are the same pictures in another order.
    subsets = 1 if len(real) == len(made) <= _SUBSET else 100
    state = np.random.get_state()
    np.random.seed(seed)  # clean-fid draws from numpy's global generator
    try:
        return clean_fid("fid").kernel_distance(real, made, num_subsets=subsets, max_subset_size=_SUBSET)
    finally:
        np.random.set_state(state)


def precision_recall(real: np.ndarray, made: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing
    Generative Models", 2019, section 2: a picture counts where it is within the distance from some picture of
    the other set to that one's `neighbours`-th nearest of its own set."""
    return _covered(made, real, neighbours), _covered(real, made, neighbours)


def _covered(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    """Share of `points` within a ball of `manifold`, whose radius is the distance to the k-th neighbour."""
    # In rows, so that 50,000 pictures need no table of 50,000 by 50,000. The nearest of all is the point
    # itself, at distance 0.
    rows = range(0, len(manifold), 1024)
    radii = [
        np.partition(_squares(manifold[i : i + 1024], manifold), neighbours, axis=1)[:, neighbours]
        for i in rows
    ]
    inside = np.zeros(len(points), bool)
    for i, radius in zip(rows, radii, strict=True):
        inside |= (_squares(manifold[i : i + 1024], points) <= radius[:, None]).any(axis=0)
    return float(inside.mean())


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squares of the distances [a, b], by scipy without the cancellation of a product of matrices: a picture
    must be at distance 0 of itself."""
    from scipy.spatial.distance import cdist

    return cdist(a, b, "sqeuclidean")


def rank_problem(pictures: int, dimensions: int) -> str | None:
    """What is wrong with a Frechet distance from so few pictures, or None."""
    if pictures > dimensions:
        return None
    return (
        f"{pictures} pictures are not more than the {dimensions} features: the covariances are singular "
        f"(rank {max(0, pictures - 1)}), and the Frechet distance says more of the number of pictures than "
        f"of their quality. It compares rows of this table only, never tables of another number; for a "
        f"distance that stands by itself give --num-samples above {dimensions}"
    )
