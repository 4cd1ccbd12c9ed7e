"""What data, encoders and tasks are to one another: plain data and the functions they come with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from geolink.graph import GraphBatch
from schemas.errors import GeoLinkError
from schemas.evaluation import Inputs
from schemas.pixels import Pixels

if TYPE_CHECKING:
    import torch

    from geolink.tasks.store import FeatureStore
    from schemas.evaluation import TaskConfig

Kind = Literal["class", "multilabel", "mask", "change"]
"""What a label is: one class, any number of classes, a mask, or a mask of what changed."""

IGNORE = 255
"""Value of a mask where nothing is scored."""

ReadPixels = Callable[[Path], Pixels]
"""Reads one image file. Raises GeoLinkError if it cannot."""


class Leak(GeoLinkError):
    """Data that must not be seen here, or that two splits share."""


@dataclass(frozen=True)
class Imagery:
    """What the stored pixels of a data set are."""

    bands: tuple[str, ...]
    wavelength_nm: tuple[float | None, ...]
    """Centre of each band."""
    dtype: str
    nodata: int
    """Stored value of pixels without data; -1: there are none."""
    size: tuple[int, int]
    """(y, x) in pixels; all images are of one size."""
    gsd_m: float | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """What is known of the images of a split without their pixels."""

    ids: NDArray[np.str_]
    """[N], of each image."""
    label: NDArray[Any] | None
    """int64 [N] (`class`), uint8 [N, class] (`multilabel`); none where labels are masks."""
    bounds_lonlat: NDArray[np.float64]
    """[N, 4], west, south, east, north in degrees; NaN: unknown."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many images were left out, by reason."""
    pixels: NDArray[np.uint64] | None = None
    """[N], or [N, date] of pairs: `geolink.tasks.leaks.image_hash` of each image, where the source
    has read them anyway."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """B images with what is known of them."""

    rows: NDArray[np.int64]
    """[B], places in the split."""
    image: Tensor
    """[B, band, y, x], as stored."""
    graph: GraphBatch | None = None
    label: NDArray[Any] | None = None
    """int64 [B] or uint8 [B, class]."""
    mask: Tensor | None = None
    """uint8 [B, y, x]; `IGNORE`: not scored."""
    second: Tensor | None = None
    """[B, band, y, x], the later of two dates."""

    def __len__(self) -> int:
        return len(self.rows)


Read = Callable[[str, NDArray[np.int64] | None, int], Iterator[TaskBatch]]
"""(split, rows that rise or none for all, images a batch) -> batches in that order."""


@dataclass(frozen=True, eq=False)
class TaskData:
    """Labelled images in splits; pixels are read only by `read`, in bounded memory."""

    name: str
    key: str
    """Hash of what was read: a cache's key."""
    kind: Kind
    imagery: Imagery
    classes: tuple[str, ...]
    splits: Mapping[str, Part]
    """By `train`, `val`, `test`."""
    read: Read
    has_graphs: bool = False
    patches: int = 0
    """Along a side, of the lattice that the graphs' `patch` counts in; 0: graphs have none."""
    tag_table: NDArray[np.float32] | None = None
    """[V, D], text embeddings that the graphs' tags are rows of."""
    tag_encoder: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a result says of the data: place, snapshot, licence."""
    notes: tuple[str, ...] = ()
    """What was done on the way, as sentences."""
    hidden: frozenset[str] = frozenset()
    labels_are_osm: bool = False
    """Whether labels are read off OSM, so that reading OSM is no fair baseline."""
    osm_class_names: tuple[str, ...] = ()
    """Taxonomy of the graphs' `osm_class`, without the 0 for none."""

    def part(self, split: str) -> Part:
        """A split. Raises Leak if it is hidden, GeoLinkError if there is none."""
        if split in self.hidden:
            raise Leak(
                f"split {split} of {self.name} is not to be seen while a model is fitted or its "
                "hyper-parameters are chosen"
            )
        if split not in self.splits:
            raise GeoLinkError(
                f"{self.name} has no split {split}; it has {', '.join(self.splits) or 'none'}"
            )
        return self.splits[split]

    def batches(
        self, split: str, rows: NDArray[np.int64] | None = None, batch_size: int = 64
    ) -> Iterator[TaskBatch]:
        """Images of a split in their order; rows: only those, rising. Raises as `part`."""
        self.part(split)
        return self.read(split, rows, batch_size)

    def hide(self, *splits: str) -> TaskData:
        """The same data, of which these splits cannot be read."""
        return replace(self, hidden=self.hidden | set(splits))


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model, or a fixed function, that makes features of images and their OSM."""

    name: str
    key: str
    """Hash of the weights and of how images are prepared: a cache's key."""
    inputs: Inputs
    prepare: Callable[[Tensor], Tensor]
    """[B, band, y, x] as stored, on the device -> float32 [B, bands, size, size]."""
    embed: Callable[[Tensor, GraphBatch | None], Tensor]
    """Prepared images and graphs -> float32 [B, width]; differentiable."""
    width: int
    module: nn.Module | None = None
    """Its parameters; none for a fixed function."""
    maps: Callable[[Tensor, GraphBatch | None], list[Tensor]] | None = None
    """Prepared images and graphs -> [B, widths[i], grid, grid]; differentiable."""
    widths: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    """Blocks that the maps come from."""
    grid: int = 0
    """Patches along a side."""
    size: int = 0
    """Pixels along a side of a prepared image."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a result says of it: step, bands, how images were prepared."""
    rebuild: Callable[[Any], Encoder] | None = None
    """The same encoder with another module of the same form (`encoders.own_copy`)."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Predictions of whole images."""

    ids: NDArray[np.str_]
    truth: NDArray[Any]
    """int64 [N], or uint8 [N, class]."""
    probability: NDArray[np.float32]
    """[N, class]."""


@dataclass(frozen=True)
class Example:
    """An image to look at."""

    id: str
    picture: NDArray[np.uint8]
    """[y, x, 3]; of two dates [y, 2 x, 3], side by side."""
    score: float
    truth: NDArray[np.uint8] | None = None
    """[y, x] classes; none where labels are of whole images."""
    predicted: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Masks:
    """Predictions of pixels, summed up by image, so that memory is bounded."""

    ids: NDArray[np.str_]
    counts: NDArray[np.int64]
    """[N, class, class], pixels by true class (row) and predicted class (column)."""
    confidence: NDArray[np.float64]
    """[bins, 3]: pixels, sum of the confidence, pixels that were right, by confidence."""
    examples: Sequence[Example] = ()
    """Best and worst."""


Outcome = Labels | Masks


@dataclass(frozen=True, eq=False)
class Fit:
    """What a task learns from: test is hidden in `data`."""

    encoder: Encoder
    data: TaskData
    rows: NDArray[np.int64]
    """Images of `train` whose labels are used, rising."""
    config: TaskConfig
    seed: int
    device: torch.device
    features: FeatureStore

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.data.classes)


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a task has learnt."""

    predict: Callable[[TaskData, str], Outcome]
    """Predictions for a split of data."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters."""
    trials: Sequence[Mapping[str, Any]] = ()
    """What was tried: hyper-parameters, and `score` on the validation split."""
    curve: Sequence[Mapping[str, Any]] = ()
    """By epoch: `epoch`, `loss`, `score` on the validation split."""
    write: Callable[[Path], None] | None = None
    """Writes the fitted weights into a folder, for `geolink predict`."""


@dataclass(frozen=True, eq=False)
class Task:
    """Something that an encoder is good for."""

    name: str
    about: str
    kinds: tuple[Kind, ...]
    """Labels it takes."""
    baselines: tuple[str, ...]
    """Those it is compared with if the config does not say."""
    chooses: bool
    """Whether it chooses hyper-parameters, so that a validation split must be there."""
    seeded: bool
    """Whether what it learns from the same images depends on a seed."""
    fit: Callable[[Fit], Fitted]
