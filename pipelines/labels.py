"""Labels of a frame: one class raster at twice the resolution, and what is counted from it.

A frame is a whole block of chips, or one imported image. It is drawn once, in half pixels; the
classes of pixels, patches and chips are all counts of the same half pixels, so they agree.
"""

from itertools import pairwise

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize

from schemas.grid import Bounds
from schemas.layout import Kind

_M2_PER_HA = 10_000.0
_QUARTER_CIRCLE = 4


def rasterise(
    geometry: NDArray[np.object_],
    osm_class: NDArray[np.uint8],
    width_m: NDArray[np.float32],
    bounds_utm: Bounds,
    cells: int,
) -> NDArray[np.uint8]:
    """Draw a frame by drawing order: a half pixel has the highest class that covers its centre.

    Parameters: `geometry` [F] features in metres of the frame's UTM zone, which may reach beyond
    the frame; `osm_class` [F] class ids, 0 is not drawn; `width_m` [F] drawn width of lines, 0 is
    not drawn (polygons have none); `bounds_utm` of the frame in metres, a square of `cells` half
    pixels a side. Points are not drawn.

    Lines are bands of their width with flat ends and round bends, so that a way cut in two covers
    what it covered before and the expected area of a band is length times width. Centres are
    compared in frame coordinates: a chip looks the same alone and in its block.

    Returns uint8 [cells, cells], y down; 0 where nothing is drawn.
    """
    raster = np.zeros((cells, cells), np.uint8)
    dimension = shapely.get_dimensions(geometry)
    drawn = (osm_class > 0) & ((dimension == 2) | ((dimension == 1) & (width_m > 0)))
    margin = np.where(dimension == 1, width_m / 2, 0.0)
    x0, y0, x1, y1 = shapely.bounds(geometry).T
    drawn &= (x0 - margin < bounds_utm[2]) & (x1 + margin > bounds_utm[0])
    drawn &= (y0 - margin < bounds_utm[3]) & (y1 + margin > bounds_utm[1])
    index = np.flatnonzero(drawn)
    if not len(index):
        return raster

    index = index[np.argsort(osm_class[index], kind="stable")]
    area = geometry[index]
    line = dimension[index] == 1
    area[line] = shapely.buffer(
        area[line], margin[index[line]], _QUARTER_CIRCLE, cap_style="flat", join_style="round"
    )
    polygon, of = shapely.get_parts(area, return_index=True)
    filled = ~shapely.is_empty(polygon)
    shapes = _geojson(polygon[filled], bounds_utm, cells)
    values = osm_class[index[of[filled]]].tolist()
    if shapes:
        rasterize(zip(shapes, values, strict=True), out=raster)
    return raster


def _geojson(
    polygon: NDArray[np.object_], bounds_utm: Bounds, cells: int
) -> list[dict[str, object]]:
    """Polygons as GeoJSON in raster coordinates; from flat lists, as it is most of the cost."""
    if not len(polygon):
        return []
    _, xy, (ring, part) = shapely.to_ragged_array(polygon, include_z=False)
    x0, y0, x1, y1 = bounds_utm
    column = (xy[:, 0] - x0) * (cells / (x1 - x0))
    row = (y1 - xy[:, 1]) * (cells / (y1 - y0))
    places = list(zip(column.tolist(), row.tolist(), strict=True))
    ends = ring.tolist()
    rings = [places[a:b] for a, b in pairwise(ends)]
    ends = part.tolist()
    return [{"type": "Polygon", "coordinates": rings[a:b]} for a, b in pairwise(ends)]


def cut_labels(
    raster2x: NDArray[np.uint8], side_y: int, side_x: int, size: int, patch: int, classes: int
) -> dict[str, NDArray[np.generic]]:
    """Labels of the chips of a frame, from its raster.

    Parameters: `raster2x` uint8 [2 * side_y * size, 2 * side_x * size] as of `rasterise`;
    `side_y`, `side_x` chips of `size` pixels down and across; `patch` pixels along a patch;
    `classes` in the taxonomy.

    Returns, for N = side_y * side_x chips in raster order (north-west first) of p * p patches,

    - `label_pixel` uint8 [N, size, size]: the commonest class of the pixel's four half pixels, 0
      being one of them. Of two that hold two each (or four that hold one), the later-drawn is
      taken in half of the pixels, by a fixed pattern over the chip, and the earlier in the others,
      which biases neither area nor place. Slanting bands thinner than a pixel lose some pixels all
      the same (a sixth of them at half a pixel): their true areas are in the patches;
    - `label_patch` uint8 [N, p, p, classes]: share of the patch's half pixels, x255 rounded;
    - `label_region` float32 [N, classes]: mean of the patches' exact shares;
    - `patch_fraction` float32 [N, p, p, classes]: the patches' shares themselves.
    """
    chips, p = side_y * side_x, size // patch
    pixel = np.empty((side_y * size, side_x * size), np.uint8)
    count = np.empty((side_y * p, side_x * p, classes), np.int32)
    high = np.tile(_tie_pattern(size), (side_y, side_x))
    # One row of patches at a time stays in the processor's cache.
    for row in range(side_y * p):
        strip = raster2x[row * 2 * patch : (row + 1) * 2 * patch]
        rows = slice(row * patch, (row + 1) * patch)
        pixel[rows] = _majority(strip, high[rows])
        count[row] = _class_counts(strip, 2 * patch, classes)

    cut = pixel.reshape(side_y, size, side_x, size).swapaxes(1, 2)
    patches = count.reshape(side_y, p, side_x, p, classes).swapaxes(1, 2)
    patches = patches.reshape(chips, p, p, classes)
    whole = 4 * patch * patch
    region = patches.sum(axis=(1, 2), dtype=np.int64) / (whole * p * p)
    return {
        "label_pixel": cut.reshape(chips, size, size),
        "label_patch": ((patches * 510 + whole) // (2 * whole)).astype(np.uint8),
        "label_region": region.astype(np.float32),
        "patch_fraction": (patches / whole).astype(np.float32),
    }


def _tie_pattern(size: int) -> NDArray[np.bool_]:
    """Half of the pixels of a chip, and half along every row, column and diagonal."""
    y, x = np.ogrid[:size, :size]
    pattern: NDArray[np.bool_] = (y + 2 * x) % 4 < 2
    return pattern


def _majority(strip: NDArray[np.uint8], high: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Commonest value of each 2 x 2 of `strip`; ties go to the highest where `high`."""
    a, b, c, d = strip[::2, ::2], strip[::2, 1::2], strip[1::2, ::2], strip[1::2, 1::2]
    low_top, high_top = np.minimum(a, b), np.maximum(a, b)
    low_bottom, high_bottom = np.minimum(c, d), np.maximum(c, d)
    first, last = np.minimum(low_top, low_bottom), np.maximum(high_top, high_bottom)
    second, third = np.maximum(low_top, low_bottom), np.minimum(high_top, high_bottom)
    # Now first <= the two middle ones <= last.
    second, third = np.minimum(second, third), np.maximum(second, third)
    pair_first, pair_last = first == second, third == last
    take_last = np.where(pair_first == pair_last, high, pair_last)
    return np.where(second == third, second, np.where(take_last, last, first))


def _class_counts(strip: NDArray[np.uint8], side: int, classes: int) -> NDArray[np.int64]:
    """Cells of each class in each square of `side` of a row of squares; [squares, classes].

    One comparison per class; its bytes are added down the columns eight at a time, as uint64,
    over at most 255 rows, which no byte overflows.
    """
    width = strip.shape[1]
    step = next(n for n in range(min(side, 255), 0, -1) if side % n == 0)
    hit = np.zeros((side, -(-width // 8) * 8), bool)
    words = hit.view(np.uint64).reshape(side // step, step, -1)
    column = np.empty((classes, side // step, width), np.uint8)
    for c in range(classes):
        np.equal(strip, c + 1, out=hit[:, :width])
        column[c] = words.sum(axis=1).view(np.uint8)[:, :width]
    part = column.reshape(classes, side // step, width // side, side)
    counts: NDArray[np.int64] = part.sum(axis=(1, 3), dtype=np.int64).T
    return counts


def densities(
    kind: NDArray[np.uint8],
    osm_class: NDArray[np.uint8],
    size: NDArray[np.float32],
    chip: NDArray[np.int64],
    bounds_utm: NDArray[np.float64],
    classes: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How densely lines and points of each class lie in each chip.

    Parameters: `kind`, `osm_class`, `size` (metres for lines) and `chip` [M] of the objects;
    `bounds_utm` [N, 4] metres of the chips; `classes` in the taxonomy.

    Returns two arrays float32 [N, classes]: metres of lines per hectare, points per hectare.
    Objects without a class count nowhere.
    """
    chips = len(bounds_utm)
    hectare = np.prod(bounds_utm[:, 2:] - bounds_utm[:, :2], axis=1) / _M2_PER_HA

    def per_hectare(chosen: NDArray[np.bool_], amount: NDArray[np.float32]) -> NDArray[np.float32]:
        chosen = chosen & (osm_class > 0)
        cell = chip[chosen] * classes + osm_class[chosen] - 1
        total = np.bincount(cell, amount[chosen], chips * classes).reshape(chips, classes)
        density: NDArray[np.float32] = (total / hectare[:, None]).astype(np.float32)
        return density

    lines = per_hectare(kind == Kind.LINE, size)
    return lines, per_hectare(kind == Kind.POINT, np.ones_like(size))
