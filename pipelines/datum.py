"""Change of datum between a scene's CRS and the chip grid's (WGS 84).

Pixels are moved by the transformation that PROJ takes by default: of those that are installed, the
one it states to be most accurate at the place. Its stated accuracy is recorded; where it is a null
transformation (NAD83 to WGS 84, 4 m), what lies between the datums, up to about 2 m, stays in the
pixels. PROJ's grids, if installed, make it better.
"""

from functools import lru_cache
from typing import NamedTuple

from pyproj import CRS, Transformer

from schemas.grid import Bounds


class DatumChange(NamedTuple):
    """How PROJ gets from one datum to another."""

    name: str
    """PROJ's name of the operation."""
    accuracy_m: float | None
    """As PROJ states it; None: it does not."""

    @property
    def text(self) -> str:
        """For the record of a scene."""
        stated = "unstated accuracy" if self.accuracy_m is None else f"{self.accuracy_m:g} m"
        return f"{self.name} ({stated})"


def datum_change(epsg: int, utm_epsg: int, bounds_utm: Bounds) -> DatumChange | None:
    """The change of datum from a CRS to a UTM zone's at a block; None: both are on WGS 84."""
    x0, y0, x1, y1 = bounds_utm
    return _change(epsg, utm_epsg, round((x0 + x1) / 2), round((y0 + y1) / 2))


@lru_cache(maxsize=10_000)
def _change(epsg: int, utm_epsg: int, x: int, y: int) -> DatumChange | None:
    source = CRS.from_epsg(epsg)
    datum = source.geodetic_crs.datum if source.geodetic_crs else None
    if datum is None or datum.name.startswith("World Geodetic System 1984"):
        return None
    # Which operation is taken is known once a point has gone through.
    there = Transformer.from_crs(utm_epsg, epsg, always_xy=True)
    there.transform(x, y)
    used = there.get_last_used_operation()
    return DatumChange(used.description, used.accuracy if used.accuracy >= 0 else None)
