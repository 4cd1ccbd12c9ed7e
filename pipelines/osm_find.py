"""Which published OSM extracts cover a region: asked of QuackOSM's finder."""

import warnings

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from pipelines.places import region_geometry
from schemas.errors import GeoLinkError
from schemas.sources import Region


def find_extracts(region: Region, provider: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Addresses of the smallest extracts that cover a region, in order, and findings.

    The finder's index of a provider is kept in the user's cache (`osmfinder`), and loaded from the
    network where it is not there. `osm_region_uncovered` where a part of the region, often sea,
    lies in no extract.

    Raises GeoLinkError: no network and no index, or no extract meets the region.
    """
    # Needed only here, and it loads much.
    import osmfinder

    place = _turned(region_geometry(region))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = osmfinder.find_extracts_by_geometry(
                place, source=provider, allow_uncovered_geometry=True
            )
    except Exception as error:  # the finder passes on what its sources raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise GeoLinkError(
            f"cannot look up OSM extracts of {provider} ({reason}); check the network, or download "
            "an extract yourself and give it as osm.pbf"
        ) from error
    if not found.extracts:
        raise GeoLinkError(
            f"no OSM extract of {provider} covers the region; try `find: any`, or give osm.pbf"
        )
    uncovered = found.uncovered_geometry.area > 1e-9 * place.area
    urls = tuple(sorted(extract.url for extract in found.extracts))
    return urls, {"osm_region_uncovered": 1} if uncovered else {}


def _turned(place: BaseGeometry) -> BaseGeometry:
    """The same place with all longitudes within ±180 degrees."""
    parts = []
    for turn in (-360.0, 0.0, 360.0):
        moved = shapely.transform(place, lambda xy, turn=turn: xy + np.array([turn, 0.0]))
        parts.append(shapely.intersection(moved, shapely.box(-180.0, -90.0, 180.0, 90.0)))
    return shapely.union_all(parts)
