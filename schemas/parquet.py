"""Parquet in memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> "pa.Table":
    """The table of a Parquet file's content.

    Raises pyarrow.ArrowException if it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # In this thread alone: a process that ends while Arrow's pool still lets go of the bytes is
    # aborted, with its exit status lost (pyarrow 26, one time in two with small files).
    return pq.read_table(
        pa.BufferReader(data),
        columns=None if columns is None else list(columns),
        use_threads=False,
        pre_buffer=False,
    )
