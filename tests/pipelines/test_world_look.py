"""The pictures: shifted as stated, lit from where the sun is, and telling of what is there."""

import numpy as np
import pytest
import shapely
from rasterio.features import rasterize
from rasterio.transform import from_origin
from sklearn.neighbors import KNeighborsClassifier

from pipelines.world.aerial import render_aerial
from pipelines.world.appearance import Drawables, drawables
from pipelines.world.features import features
from pipelines.world.ground import make_ground, shadows
from pipelines.world.noise import value_noise, value_noise_at
from pipelines.world.sentinel2 import render_pair
from pipelines.world.town import Town, make_town


@pytest.fixture(scope="module")
def town() -> Town:
    return make_town(3, 2.0)


@pytest.fixture(scope="module")
def things(town: Town) -> Drawables:
    return drawables(town.features)


def displacement(moved: np.ndarray, still: np.ndarray) -> np.ndarray:
    """Shift of `moved` against `still` in pixels (right, down), to a fraction of a pixel.

    The phase of the cross spectrum is a plane whose slope is the shift; fitted by least squares
    over the low frequencies, which noise and aliasing leave alone.
    """
    h, w = still.shape
    window = np.hanning(h)[:, None] * np.hanning(w)
    a, b = (np.fft.fft2((i - i.mean()) * window) for i in (moved, still))
    fy, fx = np.meshgrid(np.fft.fftfreq(h), np.fft.fftfreq(w), indexing="ij")
    cross = a * np.conj(b)
    low = (np.hypot(fx, fy) < 0.15) & (np.hypot(fx, fy) > 0)
    weight = np.abs(cross[low])
    design = -2 * np.pi * np.c_[fx[low], fy[low]] * np.sqrt(weight)[:, None]
    return np.linalg.lstsq(design, np.angle(cross[low]) * np.sqrt(weight), rcond=None)[0]


def test_content_lies_off_the_map_by_the_stated_misregistration(
    town: Town, things: Drawables
) -> None:
    red = [
        render_pair(town.features, things, town.bounds_utm, shift, 0)[1].bands["red"].astype(float)
        for shift in ((4.0, -3.0), (0.0, 0.0))
    ]
    land = [np.log(b[:, 80:]) for b in red]
    # 4 m east and 3 m south are 0.4 and 0.3 pixels right and down.
    np.testing.assert_allclose(displacement(*land), [0.4, 0.3], atol=0.08)


def test_shadows_fall_away_from_the_sun_by_height_over_its_slope() -> None:
    house = shapely.box(100, 100, 110, 110)
    scene = features([house], {"building": "apartments", "height": "20", "roof:shape": "flat"})
    ground = make_ground(drawables(scene), scene, (0, 0, 200, 200), 1.0, (0.0, 0.0))
    dark = shadows(ground, (180.0, 45.0)) & (ground.index != 1)
    rows, columns = np.nonzero(dark[:, 103:107])
    north_of_house = 200 - 110 - 1 - rows.min() + 1
    assert abs(north_of_house - 20) <= 2  # a wall of 20 m under a sun of 45 degrees
    assert not dark[200 - 100 :, 100:110][:4].any()
    assert len(columns)


def test_the_same_place_looks_the_same_from_another_frame(town: Town, things: Drawables) -> None:
    cx, cy = (round(c) for c in town.centre_utm)
    large = render_aerial(
        town.features, things, (cx - 200, cy - 200, cx + 200, cy + 200), 1.0, (0, 0), 0
    )
    small = render_aerial(
        town.features, things, (cx - 100, cy - 100, cx + 100, cy + 100), 1.0, (0, 0), 0
    )
    inner = large[:, 130:270, 130:270].astype(int)
    apart = np.abs(inner - small[:, 30:170, 30:170].astype(int))
    # Only the grain of the picture differs.
    assert np.quantile(apart, 0.99) < 16


def test_noise_at_points_equals_noise_on_a_grid() -> None:
    x, y = np.linspace(-500.0, 900.0, 23), np.linspace(40.0, -700.0, 17)
    grid = value_noise(x, y, 61.0, 5)
    xx, yy = np.meshgrid(x, y)
    points = value_noise_at(np.c_[xx.ravel(), yy.ravel()], 61.0, 5)
    np.testing.assert_allclose(grid.ravel(), points, atol=1e-5)
    assert np.abs(grid).max() <= 1


def test_the_look_of_a_patch_tells_its_class_but_not_always(town: Town, things: Drawables) -> None:
    rules = {
        "farmland": 1, "meadow": 2, "grass": 2, "forest": 3, "residential": 4, "industrial": 5,
        "retail": 5, "commercial": 5, "water": 6, "wood": 3, "grassland": 2, "park": 7,
    }  # fmt: skip
    codes = [
        max(
            (rules.get(v, 0) for k, v in t.items() if k in ("landuse", "natural", "leisure")),
            default=0,
        )
        for t in town.features.mapped
    ]
    x0, _, _, y1 = town.bounds_utm
    scene = render_pair(town.features, things, town.bounds_utm, (4.0, -3.0), 0)[1]
    shape = scene.bands["red"].shape
    polygon = shapely.get_dimensions(town.features.geometry) == 2
    burnt = [
        (g, c) for g, c, p in zip(town.features.geometry, codes, polygon, strict=True) if c and p
    ]
    label = rasterize(burnt, out_shape=shape, transform=from_origin(x0, y1, 10, 10))
    clear = np.kron(np.isin(scene.scl, [4, 5, 6, 7]), np.ones((2, 2), bool))
    k = 4
    blocks = label.reshape(shape[0] // k, k, -1, k).swapaxes(1, 2).reshape(-1, k * k)
    seen = clear.reshape(shape[0] // k, k, -1, k).swapaxes(1, 2).reshape(-1, k * k).all(axis=1)
    pure = (blocks == blocks[:, :1]).all(axis=1) & (blocks[:, 0] > 0) & seen
    bands = [scene.bands[b].astype(float) for b in ("blue", "green", "red", "nir")]
    means = [
        b.reshape(shape[0] // k, k, -1, k).swapaxes(1, 2).reshape(-1, k * k).mean(axis=1)
        for b in bands
    ]
    features_, classes = np.log(np.stack(means, axis=1)[pure]), blocks[pure, 0]
    west = np.arange(len(classes)) % 2 == 0
    model = KNeighborsClassifier(5).fit(features_[west], classes[west])
    accuracy = model.score(features_[~west], classes[~west])
    majority = np.bincount(classes[~west]).max() / (~west).sum()
    land = classes[~west] != 6
    on_land = model.score(features_[~west][land], classes[~west][land])
    assert accuracy > majority + 0.15
    assert 0.4 < on_land < 0.95
