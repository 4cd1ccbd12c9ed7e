"""Sources of a dataset in its config: where, which scenes, which OSM extracts."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.base import Config
from schemas.grid import Bounds


class Sampling(Config):
    """Which chips of the region are kept, where not all of them are wanted."""

    chips: Annotated[int, Field(ge=1, description="Chips to keep over the whole region.")]
    by: Annotated[
        Literal["place", "land-use", "osm-density"],
        Field(
            description="Strata that share the chips evenly: none, the class that covers most of "
            "the chip, or fifths of the number of OSM objects."
        ),
    ] = "place"
    seed: Annotated[int, Field(ge=0, description="Seed of the choice.")] = 0


class Region(Config):
    """Where: one of a box of degrees, GeoJSON (inline or a file), or points with a radius."""

    bbox: Annotated[
        Bounds | None,
        Field(description="west, south, east, north in degrees; east > 180 crosses 180°."),
    ] = None
    geojson: Annotated[
        dict[str, object] | None, Field(description="Polygon or MultiPolygon, lon/lat.")
    ] = None
    file: Annotated[Path | None, Field(description="GeoJSON file of polygons, lon/lat.")] = None
    points: Annotated[
        Path | tuple[tuple[float, float], ...] | None,
        Field(description="(lon, lat) pairs, or a file of them: GeoJSON points, or CSV lon,lat."),
    ] = None
    radius_m: Annotated[
        float | None, Field(gt=0, description="Chips centred this near to a point are built.")
    ] = None
    sample: Annotated[Sampling | None, Field(description="Keep a sample of the chips.")] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(v is not None for v in (self.bbox, self.geojson, self.file, self.points)) != 1:
            raise ValueError("give exactly one of bbox, geojson, file, points")
        if (self.points is None) != (self.radius_m is None):
            raise ValueError("points need radius_m, and nothing else does")
        if self.bbox and not (self.bbox[0] < self.bbox[2] and self.bbox[1] < self.bbox[3]):
            raise ValueError(f"bbox {list(self.bbox)} has no area; west < east and south < north")
        if self.bbox and not (self.bbox[1] >= -90 and self.bbox[3] <= 90):
            raise ValueError(
                f"bbox {list(self.bbox)} is not in degrees; order is west, south, east, north"
            )
        return self


class SceneSource(Config):
    """Where pixels come from, which scenes may give them, and how they are put together."""

    stac: Annotated[
        str | None, Field(description="URL of a STAC API, or URL or path of a catalog.json.")
    ] = None
    rasters: Annotated[
        tuple[str, ...] | None, Field(description="Paths or globs of georeferenced rasters.")
    ] = None
    collections: Annotated[tuple[str, ...], Field(description="STAC collections; none: all.")] = ()
    start: Annotated[datetime | None, Field(description="Earliest acquisition (UTC).")] = None
    end: Annotated[datetime | None, Field(description="Latest acquisition (UTC).")] = None
    query: Annotated[
        dict[str, dict[Literal["eq", "neq", "lt", "lte", "gt", "gte", "in"], object]],
        Field(
            description="Conditions on item properties, e.g. {'platform': {'eq': 'sentinel-2a'}}; "
            "asked of the server where it can answer, tested here in any case.",
            default_factory=dict,
        ),
    ]
    sign: Annotated[
        Literal["none", "planetary-computer", "requester-pays"],
        Field(description="How hrefs are made readable; requester-pays: AWS, you pay."),
    ] = "none"
    max_cloud: Annotated[
        float, Field(ge=0, le=100, description="Largest cloud cover of a scene in percent.")
    ] = 80.0
    max_block_cloud: Annotated[
        float,
        Field(ge=0, le=100, description="Largest masked share over a shard's block in percent."),
    ] = 100.0
    min_coverage: Annotated[
        float, Field(ge=0, le=1, description="Smallest share of a block that a scene covers.")
    ] = 0.0
    min_sun_elevation: Annotated[
        float, Field(ge=-90, le=90, description="Lowest sun in degrees; unknown passes.")
    ] = -90.0
    composite: Annotated[
        Literal["least-cloudy", "median", "best-patch"],
        Field(
            description="Pixels from the least cloudy scene first; the median of all valid ones; "
            "or each patch from the scene that is clearest there."
        ),
    ] = "least-cloudy"
    max_scenes: Annotated[
        int, Field(ge=1, description="Scenes tried for a block, best metadata first.")
    ] = 12
    dates: Annotated[
        int, Field(ge=1, description="Days per place, each as a chip of its own, clearest first.")
    ] = 1
    resampling: Annotated[
        Literal["nearest", "bilinear", "cubic"],
        Field(description="For bands whose native grid is not the chip grid."),
    ] = "bilinear"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.stac is None) == (self.rasters is None):
            raise ValueError("give exactly one of stac, rasters")
        if self.start and self.end and self.start > self.end:
            raise ValueError(f"start {self.start} is after end {self.end}")
        return self

    @field_validator("start", "end")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


DROP_KEYS = (
    "name", "name:*", "*_name", "*_name:*", "addr:*", "addr*", "ref", "ref:*", "*_ref", "*:ref",
    "source", "source:*", "*:source", "note", "note:*", "fixme", "FIXME", "comment", "description",
    "description:*", "created_by", "attribution", "wikidata", "wikipedia", "*:wikidata",
    "*:wikipedia", "wikipedia:*", "image", "website", "website:*", "url", "email", "phone", "fax",
    "contact:*", "opening_hours", "opening_hours:*", "operator", "operator:*", "brand", "brand:*",
    "network:*", "check_date", "check_date:*", "survey:date", "start_date", "tiger:*", "gnis:*",
    "osak:*", "import*", "uuid", "*:id", "*_id", "id", "layer", "mapillary*", "ele", "type",
)  # fmt: skip


class OsmSource(Config):
    """Where objects come from and which of their tags are kept."""

    pbf: Annotated[
        tuple[str, ...],
        Field(description="OSM extract in PBF format: path or URL, or several of them."),
    ] = ()
    find: Annotated[
        Literal["any", "geofabrik", "osmfr", "bbbike"] | None,
        Field(description="Instead of pbf: download the smallest extracts that cover the region."),
    ] = None
    max_age_days: Annotated[
        float | None, Field(gt=0, description="An extract with older data is a finding.")
    ] = None
    drop_keys: Annotated[
        tuple[str, ...], Field(description="Tag keys left out; `*` matches anything.")
    ] = DROP_KEYS
    keep_keys: Annotated[
        tuple[str, ...],
        Field(description="If given, only these keys are kept; each must occur in the extract."),
    ] = ()

    @field_validator("pbf", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return (str(value),) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.pbf) == (self.find is not None):
            raise ValueError("give exactly one of pbf, find")
        return self
