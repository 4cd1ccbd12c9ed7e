"""Few labels: which training images keep theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def few_labels(
    label: NDArray[Any] | None, count: int, share: float, seed: int
) -> NDArray[np.int64]:
    """Rows [K], rising, of the images whose labels are used.

    Of each class the share that comes first in an order drawn by the seed, at least one image: so
    the images of a smaller share are among those of a larger. Where an image has several classes
    or a mask, a share of all images, and of `multilabel` at least one image of each class.

    Args:
        label: int64 [N], or uint8 [N, class], or none.
        count: N.
        share: in (0, 1].
        seed: of the order.
    """
    order = np.random.default_rng(seed).permutation(count)
    if label is None:
        chosen = order[: max(1, round(share * count))]
    elif label.ndim == 2:
        several = label[order] > 0
        first = order[several.argmax(0)[several.any(0)]]
        chosen = np.union1d(order[: max(1, round(share * count))], first)
    else:
        # The place of each image among those of its class, in the drawn order.
        by_class = np.argsort(label[order], kind="stable")
        counts = np.bincount(label)
        start = np.cumsum(counts) - counts
        rank = np.arange(count) - start[label[order][by_class]]
        most = np.maximum(np.round(share * counts), 1)[label[order][by_class]]
        chosen = order[by_class[rank < most]]
    return np.sort(chosen).astype(np.int64)
