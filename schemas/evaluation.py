"""Config of an evaluation."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from schemas.base import Config
from schemas.storage import Location

TaskName = Literal["knn", "linear", "finetune", "segmentation", "change", "zones", "villages"]
Inputs = Literal["image", "osm", "image+osm"]
Baseline = Literal[
    "random", "imagenet", "pixels", "bands", "osm", "image-only", "osm-only", "difference",
    "majority",
]  # fmt: skip
"""`osm`: the classes of the objects themselves; `image-only`, `osm-only`: the checkpoint given no
more than that; `difference`: of the pixels of two dates."""
SplitName = Literal["train", "val", "test"]


def _weights(value: Any) -> Any:
    named = isinstance(value, str) and value.startswith(("timm:", "random:"))
    return value if named or not isinstance(value, str) else Path(value)


Weights = Annotated[Path | str, BeforeValidator(_weights)]
"""A folder, a file, `timm:NAME`, `timm:NAME@FILE` or `random:` before any of these."""


class KnnOptions(Config):
    """Of the task knn."""

    k: Annotated[int, Field(ge=1, description="Neighbours.")] = 20
    temperature: Annotated[float, Field(gt=0, description="Of the neighbours' weights.")] = 0.07


class LinearOptions(Config):
    """Of the task linear: one classifier is fitted for each penalty, by L-BFGS."""

    penalties: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...],
        Field(min_length=1, description="L2 penalties that are tried; validation chooses."),
    ] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    steps: Annotated[int, Field(ge=1, description="Most steps of L-BFGS.")] = 200


class TrainingOptions(Config):
    """Of tasks that train by steps: finetune, and heads on feature maps."""

    epochs: Annotated[int, Field(ge=1, description="Most passes over the labelled images.")] = 30
    batch_size: Annotated[int, Field(ge=1, description="Images a step.")] = 64
    lr: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...],
        Field(min_length=1, description="Rates that are tried; validation chooses."),
    ] = (1e-3,)
    weight_decay: Annotated[float, Field(ge=0, description="Of AdamW.")] = 0.05
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="Share of the steps in which the rate rises.")
    ] = 0.1
    layer_decay: Annotated[
        float, Field(gt=0, le=1, description="Factor of the rate from a block to the one below.")
    ] = 0.75
    patience: Annotated[
        int, Field(ge=1, description="Epochs without a better validation score until it stops.")
    ] = 8
    mixup: Annotated[float, Field(ge=0, description="Alpha of mixup; 0: none.")] = 0.0
    flips: Annotated[
        bool, Field(description="Whether images are flipped and turned by quarters at random.")
    ] = True
    freeze: Annotated[bool, Field(description="Whether the encoder stays as it is.")] = False
    head: Annotated[
        Literal["upernet", "fpn", "linear"], Field(description="Of masks: segmentation, change.")
    ] = "upernet"


class TaskConfig(Config):
    """What `geolink evaluate` needs. Relative paths are taken from the config file's folder."""

    task: Annotated[TaskName, Field(description="What is evaluated.")] = "knn"
    checkpoint: Annotated[
        Weights,
        Field(description="Checkpoint or run folder, published file, `timm:NAME`, `random:...`."),
    ]
    data: Annotated[
        Location, Field(description="Dataset of GeoLink, folder of labelled images, or .npz file.")
    ]
    snapshot: Annotated[
        int | None, Field(ge=1, description="Of a dataset of GeoLink; none: the latest.")
    ] = None
    labels: Annotated[
        Literal["region", "regions", "object", "patch", "pixel"] | Path,
        Field(
            description="Of a dataset of GeoLink: `region`: class of most area of a chip; "
            "`regions`: all classes of a chip; `object`: class of the largest polygon; `patch`, "
            "`pixel`: masks of what covers each most; or a CSV file with id, label and maybe split."
            " Of label maps: `region`, `patch`, `pixel`."
        ),
    ] = "region"
    min_share: Annotated[
        float, Field(ge=0, le=1, description="Share of a chip that its class covers at least.")
    ] = 0.0
    inputs: Annotated[Inputs, Field(description="What the encoder is given.")] = "image"
    bands: Annotated[
        tuple[str, ...],
        Field(description="Names of the bands of image files; none: as files say, or red, green, "
              "blue."),
    ] = ()  # fmt: skip
    size: Annotated[
        int | None,
        Field(
            ge=8,
            description="Side that images are resized to, positions being interpolated; none: the "
            "checkpoint's.",
        ),
    ] = None
    normalise: Annotated[
        Literal["checkpoint", "data"],
        Field(description="Whose mean and deviation of bands: `data`: of the training images."),
    ] = "checkpoint"
    fit: Annotated[tuple[SplitName, ...], Field(description="Splits that are learnt from.")] = (
        "train",
    )
    held_out: Annotated[tuple[SplitName, ...], Field(description="Splits that are scored.")] = (
        "test",
    )
    shares: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(min_length=1, description="Shares of the labels that are used, one after another."),
    ] = (1.0,)
    seeds: Annotated[int, Field(ge=1, description="How often, each with other labels.")] = 1
    baselines: Annotated[
        tuple[Baseline, ...] | None,
        Field(description="What it is compared with; none: what suits the task and the data."),
    ] = None
    imagenet: Annotated[
        Weights, Field(description="Weights of the baseline `imagenet`.")
    ] = "timm:vit_small_patch16_224"  # fmt: skip
    knn: Annotated[KnnOptions, Field(description="How neighbours vote.")] = KnnOptions()
    linear: Annotated[LinearOptions, Field(description="How the probe is fitted.")] = (
        LinearOptions()
    )
    training: Annotated[
        TrainingOptions, Field(description="Of tasks that train by steps.")
    ] = TrainingOptions()  # fmt: skip
    batch_size: Annotated[int, Field(ge=1, description="Images encoded at once.")] = 128
    bootstrap: Annotated[int, Field(ge=10, description="Resamples of the interval.")] = 1000
    seed: Annotated[int, Field(ge=0, description="First of the seeds.")] = 0
    accelerator: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], Field(description="Where it runs.")
    ] = "auto"
    cache: Annotated[
        Path | None, Field(description="Folder of features that are kept; none: not kept.")
    ] = None
    output: Annotated[Path | None, Field(description="Folder of the results.")] = None

    @model_validator(mode="after")
    def _no_split_twice(self) -> Self:
        if both := sorted({*self.fit} & {*self.held_out}):
            raise ValueError(
                f"split {both[0]} is in fit and in held_out: what is learnt from cannot be scored"
            )
        return self
