"""Tags: ids without coordination."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def tag_id(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Ids of `key=value` texts: the first 8 bytes, big endian, of BLAKE2b of their UTF-8."""
    digests = b"".join(hashlib.blake2b(t.encode()).digest()[:8] for t in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
