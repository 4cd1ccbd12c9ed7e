"""Config of a dataset: what to build, on which grid, from which sources, into which splits."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from schemas.base import Config
from schemas.grid import Grid
from schemas.sensor import SENSORS, Sensor, sensor
from schemas.sources import OsmSource, Region, SceneSource
from schemas.storage import Location
from schemas.taxonomy import Taxonomy, default_taxonomy


class ObjectOptions(Config):
    """Which clipped objects enter a chip."""

    min_polygon_fraction: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Smallest polygon, as a share of the chip's area (paper: 0.005).",
        ),
    ] = 0.0
    min_line_fraction: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Shortest line, as a share of the chip's perimeter (paper: 0.01).",
        ),
    ] = 0.0
    max_per_chip: Annotated[
        int | None,
        Field(ge=1, description="Keep only the largest so many objects; the rest is counted."),
    ] = None


class Splits(Config):
    """Train, validation and test by place: a seeded hash of square blocks of shards."""

    block_km: Annotated[
        float, Field(gt=0, description="Side of a block, rounded to whole shards.")
    ] = 20.0
    train: Annotated[float, Field(ge=0, le=1, description="Share of blocks.")] = 0.8
    val: Annotated[float, Field(ge=0, le=1, description="Share of blocks.")] = 0.1
    test: Annotated[float, Field(ge=0, le=1, description="Share of blocks.")] = 0.1
    seed: Annotated[int, Field(ge=0, description="Seed of the hash.")] = 0
    buffer_m: Annotated[
        float, Field(ge=0, description="Chips nearer than this to another split are dropped.")
    ] = 0.0

    @model_validator(mode="after")
    def _sum(self) -> Self:
        if abs(self.train + self.val + self.test - 1.0) > 1e-6:
            raise ValueError(
                f"train, val and test add up to {self.train + self.val + self.test:g}, not to 1"
            )
        return self


Registration = Literal["keep", "correct", "drop"]
"""What is done about a sure shift between image and OSM."""


class SensorChoice(Config):
    """A preset, or some of its bands in another order."""

    preset: Annotated[str, Field(description=f"One of: {', '.join(SENSORS)}.")]
    bands: Annotated[tuple[str, ...] | None, Field(description="Bands to keep; none: all.")] = None


def _sensor_form(value: object) -> str:
    """Which of the three forms of `sensor` a value has, so that its errors speak of that one."""
    if isinstance(value, str):
        return "name"
    if isinstance(value, SensorChoice) or (isinstance(value, dict) and "preset" in value):
        return "preset"
    return "table"


class DatasetConfig(Config):
    """What `geolink build` needs. Relative paths are taken from the config file's folder."""

    name: Annotated[str, Field(pattern=r"^[\w .-]+$", description="Name of the dataset.")]
    dataset: Annotated[
        Location, Field(description="Folder of the dataset, or s3://, gs:// or az:// address.")
    ]
    grid: Annotated[Grid, Field(description="Size and spacing of chips.")]
    sensor: Annotated[
        Annotated[str, Tag("name")]
        | Annotated[SensorChoice, Tag("preset")]
        | Annotated[Sensor, Tag("table")],
        Discriminator(_sensor_form),
        Field(description=f"A preset ({', '.join(SENSORS)}), part of one, or a band table."),
    ]
    region: Annotated[Region | None, Field(description="Where to build.")] = None
    scenes: Annotated[SceneSource | None, Field(description="Where pixels come from.")] = None
    osm: Annotated[OsmSource | None, Field(description="Where objects come from.")] = None
    pairs: Annotated[
        Path | None,
        Field(
            description="Folder of image-OSM pairs (one folder each: image, meta.json, "
            "*_point/_line/_polygon.geojson) instead of region, scenes and osm."
        ),
    ] = None
    objects: Annotated[ObjectOptions, Field(description="Which objects are kept.")] = (
        ObjectOptions()
    )
    splits: Annotated[Splits, Field(description="Train, validation, test.")] = Splits()
    taxonomy: Annotated[
        Path | None, Field(description="YAML file of classes; none: the one that ships.")
    ] = None
    tag_encoder: Annotated[
        Literal["wordllama", "clip-vit-b-16"], Field(description="Text encoder of tags.")
    ] = "wordllama"
    registration: Annotated[
        Registration,
        Field(
            description="Where image and OSM are surely shifted against each other: keep the chip "
            "with its finding, move the objects by the block's shift, or drop the chip."
        ),
    ] = "keep"
    min_valid: Annotated[
        float, Field(ge=0, le=1, description="Chips with a smaller valid fraction are dropped.")
    ] = 0.5
    cache: Annotated[
        Path | None, Field(description="Folder of converted extracts; none: the user's cache.")
    ] = None
    licence: Annotated[
        str | None, Field(description="Licence of the images where their metadata has none.")
    ] = None

    @field_validator("grid")
    @classmethod
    def _lattice(cls, grid: Grid) -> Grid:
        if grid.patches < 2:
            raise ValueError("a chip needs at least 2 patches a side; use a smaller patch")
        return grid

    @model_validator(mode="after")
    def _source(self) -> Self:
        grid_inputs = {"region": self.region, "scenes": self.scenes, "osm": self.osm}
        given = [k for k, v in grid_inputs.items() if v is not None]
        if self.pairs is not None and given:
            raise ValueError(
                f"give either pairs or region, scenes and osm; not pairs and {given[0]}"
            )
        if self.pairs is None and len(given) < 3:
            missing = next(k for k in grid_inputs if k not in given)
            raise ValueError(f"{missing} is missing (or give pairs)")
        return self

    def resolved_sensor(self) -> Sensor:
        """The sensor with its bands. Raises GeoLinkError for an unknown preset or band."""
        if isinstance(self.sensor, Sensor):
            return self.sensor
        if isinstance(self.sensor, SensorChoice):
            return sensor(self.sensor.preset, self.sensor.bands)
        return sensor(self.sensor)

    def resolved_taxonomy(self) -> Taxonomy:
        """The taxonomy of the config. Raises GeoLinkError for a bad file."""
        if self.taxonomy is None:
            return default_taxonomy()
        from schemas.load import load_config

        return load_config(self.taxonomy, Taxonomy)
