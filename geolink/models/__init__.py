"""The models: `GeoLink` (variant `paper`), its parts and losses, and published checkpoints.

`paper.py` is the model, top to bottom; `masking.py`, `osm.py` (graph encoder, read-out),
`fusion.py` (two-way block) and `ops.py` (packed segments, positions, patches) are its parts. May
import `schemas` and `geolink.graph`; knows nothing of data loading or training.
"""

from geolink.models.paper import GeoLink
from geolink.models.published import PAPER_VIT_LARGE, load_published
from schemas.training import ModelConfig

__all__ = ["PAPER_VIT_LARGE", "GeoLink", "ModelConfig", "load_published"]
