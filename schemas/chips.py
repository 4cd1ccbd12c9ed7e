"""Some chips of a shard, taken out whole: what exports are written from."""

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.dataset import DatasetInfo, SnapshotRow
from schemas.grid import chip_name, unpack_chip
from schemas.layout import LAYOUT, UNKNOWN_TIME

Arrays = dict[str, NDArray[Any]]

_RAGGED = (
    ("object_offset", "chip", "object"),
    ("edge_offset", "chip", "edge"),
    ("object_tag_offset", "object", "object_tag"),
    ("patch_offset", "object", "correspondence"),
)
"""CSR offsets, what they run over, and what they count."""


class ShardPart(NamedTuple):
    """Chips of one shard, as the layout has them."""

    info: DatasetInfo
    row: SnapshotRow
    arrays: Arrays
    """Of the chips; `tag` and its texts are those of the whole shard."""

    @property
    def shard(self) -> str:
        """Shard id."""
        return self.row.shard

    @property
    def names(self) -> list[str]:
        """Printed ids of the chips."""
        return [printed_id(packed) for packed in self.arrays["chip_id"]]

    @property
    def times(self) -> list[datetime | None]:
        """Acquisition of each chip, UTC; None where it is unknown."""
        return [
            None if t == UNKNOWN_TIME else datetime.fromtimestamp(t, UTC)
            for t in self.arrays["time"].tolist()
        ]

    @property
    def stems(self) -> list[str]:
        """Names of the chips' files without suffix: id, and acquisition where it is known."""
        return [
            name if time is None else f"{name}_{time:%Y%m%dT%H%M%S}"
            for name, time in zip(self.names, self.times, strict=True)
        ]

    @property
    def scenes(self) -> list[str | None]:
        """Id of the scene that gave most pixels of each chip; None where there is none."""
        known = self.arrays["scene"].tolist()
        return [self.row.scenes[n] if 0 <= n < len(self.row.scenes) else None for n in known]

    def tag_texts(self) -> list[str]:
        """`key=value` of the shard's distinct tags [U]."""
        text, at = self.arrays["tag_text"].tobytes(), self.arrays["tag_text_offset"].tolist()
        return [text[a:b].decode() for a, b in pairwise(at)]


def printed_id(packed: NDArray[np.uint64]) -> str:
    """Printed id of a packed one [2]; that of an imported pair is the hash of its name."""
    return chip_name(unpack_chip(packed)) if packed[0] else f"pair-{int(packed[1]):016x}"


def take_chips(arrays: Arrays, chips: NDArray[np.int64]) -> Arrays:
    """The arrays of some chips (indices, ascending) of a shard; its table of tags stays whole."""
    rows, offsets = {"chip": chips}, {}
    for name, over, counted in _RAGGED:
        offset = arrays[name]
        start, length = offset[rows[over]], np.diff(offset)[rows[over]]
        taken = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        rows[counted] = np.arange(taken[-1]) + np.repeat(start - taken[:-1], length)
        offsets[name] = taken
    return {
        spec.name: offsets[spec.name]
        if spec.name in offsets
        else arrays[spec.name][rows[spec.dims[0]]]
        if spec.dims[0] in rows
        else arrays[spec.name]
        for spec in LAYOUT
    }
