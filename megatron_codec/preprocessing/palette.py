"""The colours of a pixel model, from real pictures: k-means over their pixels (ImageGPT, section 3.2)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_codec.codecs.images import canonical
from megatron_codec.errors import UserError

MAX_DIFFERENT = 200_000  # colours that k-means is given at most; more change the palette very little


@dataclass(frozen=True)
class RawPixels:
    """As much of a codec as reading pictures takes: its streams are their RGB bytes, row by row."""

    image_size: int

    def encode(self, media: Image.Image | np.ndarray) -> bytes:
        """Three bytes a pixel."""
        return canonical(media, self.image_size).tobytes()


def count_colours(streams: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The different colours, uint8 [n, 3], of streams of `RawPixels`, and how often each comes, int64 [n]."""
    keys, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
    for stream in streams:
        pixels = np.frombuffer(stream, np.uint8).reshape(-1, 3).astype(np.uint32)
        new, times = np.unique(pixels[:, 0] << 16 | pixels[:, 1] << 8 | pixels[:, 2], return_counts=True)
        both = np.concatenate([keys, new])
        keys, places = np.unique(both, return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, times]), len(keys)).astype(np.int64)
    colours = np.stack([keys >> 16, keys >> 8 & 255, keys & 255], axis=1).astype(np.uint8)
    return colours, counts


def cluster(colours: np.ndarray, counts: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """At most `number` colours, uint8 [n, 3], darkest first, that stand for these with little error.

    All of them where there are no more; else the means of k-means, rounded. Needs scikit-learn.

    Args:
        colours: uint8 [n, 3], different ones.
        counts: how often each comes, int64 [n].
        seed: of the first means, and of the sample where there are more than 200,000 colours.
    """
    if number < 2:
        raise UserError(f"--num-colors {number}", "must be at least 2")
    if len(colours) > number:
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            remedy = "pip install 'megatron_codec[eval]'"
            raise UserError("scikit-learn", "is needed for k-means and not installed", remedy) from error
        if len(colours) > MAX_DIFFERENT:
            # So many pixels, drawn with replacement: a colour counts as often as it was drawn, whose mean is
            # proportional to how often it comes.
            times = np.random.default_rng(seed).multinomial(MAX_DIFFERENT, counts / counts.sum())
            colours, counts = colours[times > 0], times[times > 0]
        means = KMeans(number, random_state=seed, max_iter=100).fit(
            colours.astype(np.float64), sample_weight=counts
        )
        colours = np.unique(means.cluster_centers_.round().clip(0, 255).astype(np.uint8), axis=0)
    order = np.lexsort((*colours.T[::-1], colours.astype(int).sum(axis=1)))
    return colours[order]
