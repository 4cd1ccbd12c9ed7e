"""A Sentinel-2-like scene: twelve bands at 10, 20 and 60 m with clouds, noise and blur."""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.world.appearance import Drawables
from pipelines.world.clouds import classify, make_sky, under
from pipelines.world.covers import SEASONS
from pipelines.world.features import Features
from pipelines.world.ground import make_ground, shadows
from pipelines.world.materials import BANDS
from pipelines.world.noise import Floats, lattice
from pipelines.world.patterns import fill_rows
from pipelines.world.shore import shallows

GSD_M = 10.0
SUB = 3  # ground pixels per side of a 10 m pixel
BAND_GSD_M = {"coastal": 60, "blue": 10, "green": 10, "red": 10, "rededge1": 20, "rededge2": 20,
    "rededge3": 20,
              "nir": 10, "nir08": 20, "nir09": 60, "swir16": 20, "swir22": 20}  # fmt: skip
OFFSET_DN = 1000  # added to DN from processing baseline 04.00 on
# Light that reaches into building shade, by band.
_SKYLIGHT = np.array(
    [0.5, 0.46, 0.38, 0.32, 0.3, 0.28, 0.26, 0.25, 0.25, 0.24, 0.15, 0.12], dtype=np.float32
)
_STRIP = 48  # 10 m rows at a time


@dataclass(frozen=True)
class Pass:
    """One acquisition: when, under what sky, how processed. `sun` azimuth, elevation degrees."""

    name: str
    time: datetime
    platform: str
    season: str
    baseline: str
    sun: tuple[float, float]
    cloud_cover: float
    swath_corner: bool  # the south-east corner lies outside the swath
    gain: float

    @property
    def offset_dn(self) -> int:
        """What this processing baseline adds to the digital numbers."""
        return OFFSET_DN if self.baseline >= "04.00" else 0


PASSES = (
    Pass("S2A_30TWR_20190421_0_L2A", datetime(2019, 4, 21, 11, 6, 21, tzinfo=UTC), "sentinel-2a",
        "spring",
         "02.11", (154.0, 54.0), 0.33, True, 0.985),
    Pass("S2B_30TWR_20220618_0_L2A", datetime(2022, 6, 18, 11, 6, 17, tzinfo=UTC), "sentinel-2b",
        "summer",
         "04.00", (143.0, 65.0), 0.02, False, 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """Digital numbers by band (uint16, 0 = nodata, native resolution) and `scl` (uint8, 20 m)."""

    acquired: Pass
    bands: dict[str, NDArray[np.uint16]]
    scl: NDArray[np.uint8]


def render_pair(
    features: Features,
    things: Drawables,
    bounds: tuple[float, float, float, float],
    shift_m: tuple[float, float],
    seed: int,
) -> list[Scene]:
    """The scenes of `PASSES` over `bounds` (UTM metres, multiples of 60)."""
    ground = make_ground(things, features, bounds, GSD_M / SUB, shift_m)
    dark = [shadows(ground, p.sun) for p in PASSES]
    shallow = shallows(ground)
    h, w = ground.index.shape[0] // SUB, ground.index.shape[1] // SUB
    clear = np.empty((len(PASSES), len(BANDS), h, w), dtype=np.float32)
    for start in range(0, h, _STRIP):
        rows = slice(start * SUB, min(h, start + _STRIP) * SUB)
        index, bright = fill_rows(ground, rows)
        shore = shallow.of(rows, index, ground)
        for s, acquired in enumerate(PASSES):
            table = ground.spectra[SEASONS.index(acquired.season)]
            shaded = dark[s][rows]
            for b in range(len(BANDS)):
                value = table[:, b][index]
                value *= bright
                value *= np.where(shaded, _SKYLIGHT[b], np.float32(1))
                if shore is not None:
                    value += shore * shallow.difference[b]
                clear[s, b, start : start + len(value) // SUB] = _mean(value, SUB)
    return [
        _acquire(clear[s], p, ground.x[::SUB], ground.y[::SUB], seed + s)
        for s, p in enumerate(PASSES)
    ]


def _mean(fine: Floats, k: int) -> Floats:
    """Means of k x k pixels."""
    tall = fine.reshape(-1, k, fine.shape[1]).sum(axis=1)
    return np.asarray(sum(tall[:, i::k] for i in range(k)) / np.float32(k * k), dtype=np.float32)


def _acquire(
    clear: Floats, acquired: Pass, x: NDArray[np.float64], y: NDArray[np.float64], seed: int
) -> Scene:
    """Sky, optics, noise and numbers of one acquisition of clear reflectance [12, H, W]."""
    sky = make_sky(x, y, acquired.cloud_cover, acquired.sun, 9000 + seed)
    h, w = clear.shape[1:]
    data = np.ones((h, w), dtype=bool)
    if acquired.swath_corner:
        r, c = np.mgrid[0:h, 0:w]
        data = (r / h + 0.55 * c / w) < 1.32
    at = [BANDS.index(b) for b in ("red", "nir", "swir16")]
    scl = classify(sky, clear[at[0]], clear[at[1]], clear[at[2]], data)
    bands = {}
    for b, name in enumerate(BANDS):
        k = BAND_GSD_M[name] // 10
        seen = gaussian_filter(under(sky, clear[b] * np.float32(acquired.gain), b), 0.42)
        seen = _mean(seen, k)
        bands[name] = _digitise(seen, data[::k, ::k], acquired, seed * 100 + b)
    return Scene(acquired, bands, scl)


def _digitise(
    seen: Floats, data: NDArray[np.bool_], acquired: Pass, salt: int
) -> NDArray[np.uint16]:
    """Noise that grows with the signal, then DN = reflectance * 10000 (+ 1000 from 04.00 on)."""
    r, c = np.arange(seen.shape[0])[:, None], np.arange(seen.shape[1])[None, :]
    # The sum of four uniforms is near enough to a normal, with a variance of 1/3.
    noise = sum(lattice(c, r, salt * 4 + k) for k in range(4)) - np.float32(2)
    sigma = np.sqrt(0.0012**2 + (0.012 * seen) ** 2) * np.float32(3**0.5)
    dn = np.rint((seen + noise * sigma) * 10000) + acquired.offset_dn
    return np.where(data, np.clip(dn, 1, 65535), 0).astype(np.uint16)
