"""The chip grid: pure functions from places to chips, ids, bounds and shards.

A chip is a square of `size` pixels at `gsd_m` metres in one UTM zone (WGS 84: EPSG:326xx north,
327xx south), aligned to easting 0, northing 0 of the zone. A shard is a square block of
`shard_side` x `shard_side` chips on the same grid, the unit of work, storage and refresh.

A place has exactly one chip: the zone is that of the chip centre's longitude, in plain 6-degree
zones. The Norway and Svalbard exceptions of the military grid are deliberately not applied: they
would make the zone of a place depend on its latitude band and give two rules where one does.
Along a zone border the squares of two zones can overlap or leave slivers narrower than a chip.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pyproj import Transformer

from schemas.errors import GeoLinkError

MIN_LATITUDE, MAX_LATITUDE = -80.0, 84.0

Bounds = tuple[float, float, float, float]
"""(x_min, y_min, x_max, y_max): metres in UTM, or degrees (west, south, east, north)."""

_MM = 1000


class Chip(NamedTuple):
    """Identity of a chip: the same place has the same chip in every build."""

    epsg: int
    gsd_mm: int
    size: int
    col: int
    row: int


class Block(NamedTuple):
    """Identity of a shard: a block of chips, by zone and by column and row of shards."""

    epsg: int
    col: int
    row: int

    @property
    def name(self) -> str:
        """Printed shard id, e.g. ``32632-00012-00345``; sorts by zone, column, row."""
        return f"{self.epsg}-{self.col:05d}-{self.row:05d}"


class Grid(BaseModel):
    """Size and spacing of the chips of a dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gsd_m: Annotated[float, Field(gt=0, le=1000, description="Pixel size in metres.")]
    size: Annotated[int, Field(ge=8, le=4096, description="Pixels along one side of a chip.")]
    patch: Annotated[
        int,
        Field(ge=2, le=256, description="Pixels along one side of a patch; must divide `size`."),
    ] = 16
    shard_side: Annotated[
        int, Field(ge=1, le=64, description="Chips along one side of a shard.")
    ] = 16

    @model_validator(mode="after")
    def _divides(self) -> "Grid":
        if self.size % self.patch:
            raise ValueError(
                f"patch {self.patch} does not divide size {self.size}; "
                f"use one of {[p for p in range(2, self.size + 1) if self.size % p == 0]}"
            )
        if self.size // self.patch > 256:
            raise ValueError("more than 256 patches along a side; use a larger patch")
        if abs(self.gsd_m * _MM - round(self.gsd_m * _MM)) > 1e-9:
            raise ValueError(f"gsd_m {self.gsd_m} is not a whole number of millimetres")
        return self

    @property
    def gsd_mm(self) -> int:
        """Pixel size in millimetres."""
        return round(self.gsd_m * _MM)

    @property
    def chip_m(self) -> float:
        """Side of a chip in metres."""
        return self.size * self.gsd_mm / _MM

    @property
    def shard_m(self) -> float:
        """Side of a shard in metres."""
        return self.chip_m * self.shard_side

    @property
    def patches(self) -> int:
        """Patches along one side of a chip."""
        return self.size // self.patch


def utm_epsg(lon: float, lat: float) -> int:
    """EPSG code of the UTM zone of a place in degrees.

    Raises GeoLinkError outside 80°S-84°N, where UTM is not defined.
    """
    if not (MIN_LATITUDE <= lat <= MAX_LATITUDE) or not math.isfinite(lon):
        raise GeoLinkError(
            f"({lon:.6f}, {lat:.6f}) is outside UTM: latitude must lie between "
            f"{MIN_LATITUDE:g} and {MAX_LATITUDE:g} degrees; leave the polar area out of the region"
        )
    lon = (lon + 180.0) % 360.0 - 180.0
    zone = min(int((lon + 180.0) // 6.0) + 1, 60)
    return (32600 if lat >= 0 else 32700) + zone


@lru_cache(maxsize=256)
def to_utm(epsg: int) -> Transformer:
    """Transformer from (lon, lat) degrees WGS 84 to (easting, northing) metres."""
    return Transformer.from_crs(4326, epsg, always_xy=True)


@lru_cache(maxsize=256)
def to_lonlat(epsg: int) -> Transformer:
    """Transformer from (easting, northing) metres to (lon, lat) degrees WGS 84."""
    return Transformer.from_crs(epsg, 4326, always_xy=True)


def chip_at(grid: Grid, lon: float, lat: float) -> Chip:
    """The chip that holds a place in degrees.

    Near a zone border (or the equator) the square that holds the place may have its centre in the
    neighbouring zone; then the place's chip is the neighbour zone's square. In a sliver, where
    that one has its centre here in turn, it is the square of the place's own zone.
    """
    epsg = utm_epsg(lon, lat)
    chip = _square_at(grid, epsg, lon, lat)
    owner = _center_epsg(chip)
    if owner == epsg:
        return chip
    other = _square_at(grid, owner, lon, lat)
    return other if _center_epsg(other) == owner else chip


def _center_epsg(chip: Chip) -> int:
    lon, lat = chip_center_lonlat(chip)
    return utm_epsg(lon, min(max(lat, MIN_LATITUDE), MAX_LATITUDE))


def _square_at(grid: Grid, epsg: int, lon: float, lat: float) -> Chip:
    x, y = to_utm(epsg).transform(lon, lat)
    side = grid.chip_m
    return Chip(epsg, grid.gsd_mm, grid.size, math.floor(x / side), math.floor(y / side))


def chip_bounds(chip: Chip) -> Bounds:
    """UTM bounds of a chip in metres."""
    side = chip.size * chip.gsd_mm / _MM
    return (chip.col * side, chip.row * side, (chip.col + 1) * side, (chip.row + 1) * side)


def chip_center_lonlat(chip: Chip) -> tuple[float, float]:
    """Centre of a chip in degrees (lon, lat)."""
    x0, y0, x1, y1 = chip_bounds(chip)
    lon, lat = to_lonlat(chip.epsg).transform((x0 + x1) / 2, (y0 + y1) / 2)
    return float(lon), float(lat)


def neighbours(chip: Chip) -> list[Chip]:
    """The squares around a chip in its own zone, row by row from the north-west.

    Eight of them; fewer at the edge of the zone's coordinates, where ids would be negative.
    """
    around = [
        chip._replace(col=chip.col + dc, row=chip.row + dr)
        for dr in (1, 0, -1)
        for dc in (-1, 0, 1)
        if (dc, dr) != (0, 0)
    ]
    return [c for c in around if c.col >= 0 and c.row >= 0]


def printed_chip(chip_id: NDArray[np.uint64]) -> str:
    """A chip's packed id (uint64 [2]) as people read it; imported pairs have a hash."""
    if int(chip_id[0]) == 0:
        return f"pair-{int(chip_id[1]):016x}"
    return chip_name(unpack_chip(chip_id))


def chip_name(chip: Chip) -> str:
    """Printed chip id, e.g. ``32632-10000-64-1234-56789`` (zone, GSD in mm, size, column, row)."""
    return "-".join(str(part) for part in chip)


def parse_chip(name: str) -> Chip:
    """The chip of a printed id. Raises GeoLinkError if it is not one."""
    parts = name.split("-")
    if len(parts) != 5 or not all(p.isdigit() for p in parts):
        raise GeoLinkError(f"{name!r} is not a chip id; expected zone-gsd_mm-size-column-row")
    return Chip(*(int(p) for p in parts))


def pack_chips(
    epsg: int, grid: Grid, cols: NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Packed chip ids, uint64 [N, 2].

    The first word holds zone and hemisphere (16 bits: EPSG code minus 32000), GSD in mm (32 bits)
    and size (16 bits); the second column and row (32 bits each).
    """
    head = np.uint64((epsg - 32000) << 48 | grid.gsd_mm << 16 | grid.size)
    tail = (cols.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)
    return np.stack([np.full(len(cols), head, np.uint64), tail], axis=1)


def unpack_chip(packed: NDArray[np.uint64]) -> Chip:
    """The chip of one packed id, uint64 [2]."""
    head, tail = int(packed[0]), int(packed[1])
    return Chip(
        (head >> 48) + 32000, head >> 16 & 0xFFFFFFFF, head & 0xFFFF, tail >> 32, tail & 0xFFFFFFFF
    )


def block_of(grid: Grid, chip: Chip) -> Block:
    """The shard that holds a chip."""
    return Block(chip.epsg, chip.col // grid.shard_side, chip.row // grid.shard_side)


def block_bounds(grid: Grid, block: Block) -> Bounds:
    """UTM bounds of a shard in metres."""
    side = grid.shard_m
    return (block.col * side, block.row * side, (block.col + 1) * side, (block.row + 1) * side)


class BlockChips(NamedTuple):
    """Every square of a shard in raster order (north-west first), N = shard_side**2."""

    cols: NDArray[np.int64]
    """Chip columns [N]."""
    rows: NDArray[np.int64]
    """Chip rows [N]."""
    bounds_utm: NDArray[np.float64]
    """[N, 4] metres: x_min, y_min, x_max, y_max."""
    center_lonlat: NDArray[np.float64]
    """[N, 2] degrees."""
    owned: NDArray[np.bool_]
    """[N]: the centre's longitude and latitude lie in this zone, so the chip is this zone's."""


def block_chips(grid: Grid, block: Block) -> BlockChips:
    """The chips of a shard in raster order: index = y * shard_side + x, y down."""
    side = grid.shard_side
    y, x = np.divmod(np.arange(side * side), side)
    cols = block.col * side + x
    rows = block.row * side + (side - 1 - y)
    m = grid.chip_m
    bounds = np.stack([cols * m, rows * m, (cols + 1) * m, (rows + 1) * m], axis=1)
    lon, lat = to_lonlat(block.epsg).transform((cols + 0.5) * m, (rows + 0.5) * m)
    lonlat = np.stack([lon, lat], axis=1)
    return BlockChips(cols, rows, bounds, lonlat, owns(block.epsg, lonlat))


def owns(epsg: int, center_lonlat: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[N]: whether chips with these centres [N, 2] (degrees) are a zone's own."""
    lon, lat = center_lonlat.T
    zone = np.clip((lon + 180.0) // 6.0 + 1, 1, 60).astype(np.int64)
    inside = (lat >= MIN_LATITUDE) & (lat <= MAX_LATITUDE)
    owned: NDArray[np.bool_] = inside & (np.where(lat >= 0, 32600, 32700) + zone == epsg)
    return owned


def blocks_in(grid: Grid, lonlat: Bounds) -> Iterator[Block]:
    """Every shard that may hold a chip centred in a box of degrees, west < east, ordered.

    A box that crosses the antimeridian has east > 180 (or west < -180).

    Raises GeoLinkError if the box has no area or reaches outside 80°S-84°N.
    """
    west, south, east, north = lonlat
    if not (west < east and south < north):
        raise GeoLinkError(f"region {lonlat} has no area; give west < east and south < north")
    for lat in (south, north):
        utm_epsg(west, lat)
    crosses_equator = south < -1e-9 and north > 0
    halves = [(south, -1e-9), (0.0, north)] if crosses_equator else [(south, north)]
    for first, last in halves:
        zone_west = math.floor(west / 6.0) * 6.0
        while zone_west < east:
            part = (max(west, zone_west), first, min(east, zone_west + 6.0), last)
            yield from _zone_blocks(grid, part)
            zone_west += 6.0


def _zone_blocks(grid: Grid, lonlat: Bounds) -> Iterator[Block]:
    west, south, east, north = lonlat
    epsg = utm_epsg((west + east) / 2, (south + north) / 2)
    central = ((epsg % 100) - 1) * 6.0 - 180.0 + 3.0
    shift = round(((west + east) / 2 - central) / 360.0) * 360.0
    x0, y0, x1, y1 = to_utm(epsg).transform_bounds(
        west - shift, south, east - shift, north, densify_pts=101
    )
    side = grid.shard_m
    for row in range(max(0, math.floor(y0 / side)), math.floor(y1 / side) + 1):
        for col in range(math.floor(x0 / side), math.floor(x1 / side) + 1):
            yield Block(epsg, col, row)
