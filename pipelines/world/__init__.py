"""The embedded world: a fictitious region as a real PBF, real COGs and real STAC catalogs.

`make_world` is all that others need. One seed makes a town with its country (`town.py`), mappers
survey it incompletely (`mapping.py`), and it is rendered from what is really there (`sentinel2.py`,
`aerial.py`), so that a map and its pictures differ as real ones do. May import `schemas`.
"""

from pipelines.world.build import World, make_world

__all__ = ["World", "make_world"]
