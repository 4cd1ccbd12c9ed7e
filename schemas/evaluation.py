"""Config of an evaluation."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Config
from schemas.storage import Location

Baseline = Literal["random", "pixels", "bands"]


class EvaluateConfig(Config):
    """What `geolink evaluate` needs. Relative paths are taken from the config file's folder."""

    checkpoint: Annotated[Path, Field(description="Checkpoint folder, or run folder.")]
    dataset: Annotated[Location, Field(description="Folder of the dataset, or its address.")]
    snapshot: Annotated[int | None, Field(ge=1, description="Snapshot; none: the latest.")] = None
    task: Annotated[Literal["knn"], Field(description="`knn`: majority class of a chip.")] = "knn"
    fit: Annotated[
        tuple[Literal["train", "val", "test"], ...],
        Field(description="Splits neighbours come from."),
    ] = ("train",)
    held_out: Annotated[
        tuple[Literal["train", "val", "test"], ...], Field(description="Splits that are scored.")
    ] = ("val", "test")
    k: Annotated[int, Field(ge=1, description="Neighbours.")] = 20
    temperature: Annotated[float, Field(gt=0, description="Of the neighbours' weights.")] = 0.07
    min_share: Annotated[
        float,
        Field(ge=0, le=1, description="Chips whose majority class covers less are left out."),
    ] = 0.0
    baselines: Annotated[
        tuple[Baseline, ...],
        Field(description="Random-weight encoder, raw pixels, band statistics."),
    ] = ("random", "pixels", "bands")
    bootstrap: Annotated[int, Field(ge=10, description="Resamples of the interval.")] = 1000
    seed: Annotated[int, Field(ge=0, description="Seed of resampling and random weights.")] = 0
    output: Annotated[Path | None, Field(description="JSON file to write.")] = None
