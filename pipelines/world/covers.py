"""How each kind of surface looks (`covers.yaml`): its materials in each season, its texture."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import yaml
from numpy.typing import NDArray

from pipelines.world.materials import spectrum

SEASONS = ("spring", "summer", "late_summer")


@dataclass(frozen=True)
class Cover:
    """`variants`: each a weight and its mixture in each of `SEASONS`, or one for all of them.

    `texture` names the pattern within an object, `spread` the relative variation of brightness
    between objects, `patchy` within one at tens of metres; `trees` the chance of a tree of which
    OSM knows nothing per 81 m²; with `stands` neighbours are of one variant.
    """

    texture: str
    variants: tuple[str, ...]
    spread: float = 0.08
    patchy: float = 0.06
    trees: float = 0.0
    stands: bool = False


@cache
def variants_of(name: str) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Cumulative weights [V] in (0, 1] and reflectance [season, V, 12] of a cover's variants."""
    weights, rows = [], []
    for variant in COVERS[name].variants:
        weight, _, mixtures = variant.partition(":")
        weights.append(float(weight))
        spectra = [spectrum(m) for m in mixtures.split("|")]
        rows.append(spectra * (len(SEASONS) // len(spectra)))
    total = np.cumsum(weights)
    return total / total[-1], np.array(rows, dtype=np.float32).swapaxes(0, 1)


def _read() -> dict[str, Cover]:
    text = files("pipelines.world").joinpath("covers.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    return {
        name: Cover(**{**fields, "variants": tuple(fields["variants"])})
        for name, fields in table.items()
    }


COVERS = _read()
COVER_NAMES = tuple(COVERS)
COVER_ID = {name: i for i, name in enumerate(COVER_NAMES)}
TEXTURES = tuple(sorted({c.texture for c in COVERS.values()}))
