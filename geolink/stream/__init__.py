"""Streaming datasets as packed batches, in a seeded order, read ahead in threads.

`order` says which chips come when, `sampling` which and how often; `source` reads them from shards
(through `cache`, where they are remote), `chips` holds them, `loader` makes batches of them ahead;
`shards` and `mix` are the streams of one dataset and of several.
"""

from geolink.stream.batch import Batch
from geolink.stream.chips import LABELS, STREAMED
from geolink.stream.mix import MixedStream, mixed_vocabulary
from geolink.stream.shards import ShardStream, read_chips

__all__ = [
    "LABELS",
    "STREAMED",
    "Batch",
    "MixedStream",
    "ShardStream",
    "mixed_vocabulary",
    "read_chips",
]
