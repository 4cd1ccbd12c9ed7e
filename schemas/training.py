"""Config of a pretraining run."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from schemas.base import Config
from schemas.findings import CHIP_FLAGS, flagged
from schemas.storage import Location

Fix = Literal[
    "all_nodes", "centred_positions", "node_norm", "node_residual", "patch_mlp", "present_kinds",
    "relation_codes", "type_attention", "whole_image", "whole_region",
]  # fmt: skip
"""Quirks of the published model that can be put right, named by what takes their place."""

VIT_SIZES = {
    "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}  # fmt: skip
"""`embed_dim`, `depth`, `num_heads` by name (Dosovitskiy et al. 2021, table 1; Touvron et al.)."""


class Geolink2Config(Config):
    """What the variant geolink2 does beyond the paper, each to be switched off alone."""

    classes: Annotated[int, Field(ge=1, le=254, description="Classes of the taxonomy.")] = 20
    dense_weight: Annotated[
        float, Field(ge=0, description="Weight of the classes that cover each visible patch.")
    ] = 0.1
    relations: Annotated[
        bool, Field(description="Attention between objects knows their spatial relation.")
    ] = True
    kind_attention: Annotated[
        bool, Field(description="Points, lines and polygons of a chip are weighed against others.")
    ] = True
    correspondence: Annotated[
        bool, Field(description="Fusion is guided by which patches an object meets.")
    ] = True
    centred_positions: Annotated[
        bool, Field(description="Objects are placed on the patch lattice without the half patch.")
    ] = True
    registers: Annotated[int, Field(ge=0, description="Register tokens of the image encoder.")] = 4


class ModelConfig(Config):
    """Sizes and loss weights of a model; the defaults are a small model for small chips."""

    variant: Annotated[
        Literal["paper", "geolink2"],
        Field(description="`paper`: as published; `geolink2`: beyond it (docs/model.md)."),
    ] = "paper"
    geolink2: Annotated[
        Geolink2Config, Field(description="What geolink2 does; not used by `paper`.")
    ] = Geolink2Config()
    image_size: Annotated[int, Field(ge=8, description="Pixels along a side.")] = 64
    patch_size: Annotated[int, Field(ge=2, description="Pixels along a side of a patch.")] = 8
    bands: Annotated[int, Field(ge=1, description="Image bands.")] = 3
    vit: Annotated[
        Literal["tiny", "small", "base", "large", "huge"] | None,
        Field(description="Size of the image encoder by name, instead of the next three."),
    ] = None
    embed_dim: Annotated[int, Field(ge=8, description="Width of the image encoder.")] = 192
    depth: Annotated[int, Field(ge=1, description="Blocks of the image encoder.")] = 6
    num_heads: Annotated[int, Field(ge=1, description="Heads of the image encoder.")] = 3
    tag_dim: Annotated[int, Field(ge=1, description="Width of a tag's text embedding.")] = 256
    osm_dim: Annotated[int, Field(ge=1, description="Width of the OSM encoder.")] = 128
    fusion_dim: Annotated[int, Field(ge=4, description="Width of the fusion block.")] = 64
    fusion_depth: Annotated[int, Field(ge=1, description="Fusion blocks.")] = 1
    fusion_heads: Annotated[int, Field(ge=1, description="Heads of the fusion block.")] = 4
    projection_dim: Annotated[int, Field(ge=2, description="Width of the contrast.")] = 64
    decoder_dim: Annotated[int, Field(ge=4, description="Width of the image decoder.")] = 128
    decoder_depth: Annotated[int, Field(ge=1, description="Blocks of the image decoder.")] = 2
    decoder_heads: Annotated[int, Field(ge=1, description="Heads of the image decoder.")] = 4
    mask_ratio: Annotated[float, Field(gt=0, lt=1, description="Masked patches.")] = 0.75
    node_mask_ratio: Annotated[float, Field(ge=0, lt=1, description="Masked OSM nodes.")] = 0.2
    max_masked_nodes: Annotated[
        int | None,
        Field(ge=1, description="Most nodes per chip in the fusion (paper: 10); none: all masked."),
    ] = None
    temperature: Annotated[float, Field(gt=0, description="Of the contrast.")] = 0.2
    contrast_weight: Annotated[float, Field(ge=0, description="Weight of the contrast.")] = 0.01
    consistency_weight: Annotated[
        float, Field(ge=0, description="Weight of the masked-node consistency.")
    ] = 0.01
    fixes: Annotated[
        tuple[Fix, ...],
        Field(description="Quirks of the published model to put right (docs/model.md)."),
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, data: Any) -> Any:
        size = VIT_SIZES.get(str(data.get("vit"))) if isinstance(data, dict) else None
        if size is None:
            return data
        sizes = dict(zip(("embed_dim", "depth", "num_heads"), size))
        for name, number in sizes.items():
            if data.get(name, number) != number:
                raise ValueError(
                    f"vit {data['vit']} has {name} {number}, not {data[name]}: "
                    f"leave out {name}, or vit"
                )
        return {**data, **sizes}

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        for width, heads in (
            ("embed_dim", "num_heads"), ("fusion_dim", "fusion_heads"),
            ("decoder_dim", "decoder_heads"),
        ):  # fmt: skip
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{heads} {getattr(self, heads)} does not divide {width} {getattr(self, width)}"
                )
            if getattr(self, width) % 4:
                raise ValueError(
                    f"{width} {getattr(self, width)} cannot hold 2-D sin-cos positions: use a "
                    "multiple of 4"
                )
        patches = (self.image_size // self.patch_size) ** 2
        if not 0 < int(patches * (1 - self.mask_ratio)) < patches:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} of {patches} patches (image_size {self.image_size}, "
                f"patch_size {self.patch_size}) leaves none to see, or none to paint: use another "
                "mask_ratio or a smaller patch_size"
            )
        return self


class Augment(Config):
    """What is done to a batch on the device; image and graph get the same parameters."""

    crop: Annotated[
        tuple[float, float] | None,
        Field(description="Least and largest share of a chip's area seen (paper: 0.4, 0.9); none: "
              "all of it. A square of whole patches, scaled up to the chip's size."),
    ] = None  # fmt: skip
    rotate: Annotated[bool, Field(description="Quarter turns, drawn evenly.")] = False
    flip: Annotated[bool, Field(description="Horizontal flip of half the chips.")] = True
    jitter: Annotated[
        float, Field(ge=0, lt=1, description="Relative change of brightness and contrast.")
    ] = 0.1

    @model_validator(mode="after")
    def _is_an_area(self) -> Self:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(
                f"crop is {list(self.crop)}: give a least and a largest share of the area, in "
                "rising order, above 0 and at most 1, such as [0.4, 0.9]"
            )
        return self


class Quality(Config):
    """Which chips are learnt from, and how much each counts, by their findings."""

    drop: Annotated[
        tuple[str, ...], Field(description="Chips with one of these findings are left out.")
    ] = ()
    weights: Annotated[
        dict[str, Annotated[float, Field(ge=0)]],
        Field(description="Weight of chips with a finding; several are multiplied."),
    ] = Field(default_factory=dict)
    by: Annotated[
        Literal["loss", "sampling"],
        Field(description="Whether weights multiply the loss, or say how often chips are seen."),
    ] = "loss"

    @model_validator(mode="after")
    def _known(self) -> Self:
        unknown = [c for c in (*self.drop, *self.weights) if c not in CHIP_FLAGS]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is no finding of chips; known: {', '.join(CHIP_FLAGS)}"
            )
        return self

    def kept(self, finding: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """[chip]: whether chips are learnt from, by their array `finding`."""
        return ~flagged(finding, self.drop)

    def weight(self, finding: NDArray[np.uint32]) -> NDArray[np.float32]:
        """[chip]: weights in the loss; 1 where nothing is said."""
        weight = np.ones(len(finding), np.float32)
        for code, factor in sorted(self.weights.items()):
            weight[flagged(finding, [code])] *= np.float32(factor)
        return weight


class Keep(Config):
    """Which checkpoints of a run are kept; a checkpoint that any of these asks for."""

    last: Annotated[int, Field(ge=1, description="The last so many.")] = 2
    best: Annotated[
        int,
        Field(ge=0, description="So many with the best validation figure (`evaluate_every`)."),
    ] = 1
    every: Annotated[
        int | None, Field(ge=1, description="Those of every so many steps; none: no others.")
    ] = None


class Negatives(Config):
    """Which other chips of a batch are no negatives of a chip in the contrast."""

    min_distance_m: Annotated[
        float, Field(ge=0, description="Those whose centres are closer, in metres; 0: none.")
    ] = 0.0
    same_tags: Annotated[
        bool, Field(description="Those whose objects have the same set of tags.")
    ] = False


class MixedDataset(Config):
    """A dataset that is learnt from beside the first."""

    dataset: Annotated[Location, Field(description="Folder of the dataset, or its address.")]
    weight: Annotated[
        float, Field(gt=0, description="Batches of it for each batch of the first dataset.")
    ] = 1.0
    snapshot: Annotated[int | None, Field(ge=1, description="Snapshot; none: the latest.")] = None


class TrainConfig(Config):
    """What `geolink pretrain` needs. Relative paths are taken from the config file's folder."""

    dataset: Annotated[Location, Field(description="Folder of the dataset, or its address.")]
    snapshot: Annotated[int | None, Field(ge=1, description="Snapshot; none: the latest.")] = None
    mix: Annotated[
        tuple[MixedDataset, ...],
        Field(
            description="More datasets, of as many bands and pixels a side. Every batch is of one "
            "dataset; an epoch is one pass over the first, the others are gone through as often as "
            "their weights ask for."
        ),
    ] = ()
    run: Annotated[Path, Field(description="Folder of logs and checkpoints.")]
    split: Annotated[Literal["train", "val", "test"], Field(description="Chips learnt from.")] = (
        "train"
    )
    model: Annotated[ModelConfig, Field(description="Sizes and loss weights.")] = ModelConfig()
    quality: Annotated[Quality, Field(description="Chips by their findings.")] = Quality()
    augment: Annotated[Augment, Field(description="Augmentation.")] = Augment()
    negatives: Annotated[
        Negatives, Field(description="Pairs that the contrast does not tell apart.")
    ] = Negatives()
    start: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Weights to start from: `timm:NAME` (an image encoder), a file in a "
            "published layout, or a checkpoint or run folder; none: new ones.",
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, description="Seed of weights, order and masks.")] = 0
    epochs: Annotated[int, Field(ge=1, description="Passes over the split.")] = 20
    batch_size: Annotated[
        int, Field(ge=1, description="Chips of a step, over all devices together.")
    ] = 128
    accumulate: Annotated[
        int,
        Field(
            ge=1,
            description="Parts that each device's share of a batch is taken in, to save memory. "
            "The contrast, and the norm of the paper's OSM encoder, see one part of all devices "
            "at a time: fewer negatives than without.",
        ),
    ] = 1
    window_shards: Annotated[int, Field(ge=1, description="Shards that are shuffled together.")] = 8
    memory_mb: Annotated[
        int | None,
        Field(
            ge=1,
            description="What shards and batches may take, over all devices, in MB (10^6 bytes): "
            "fewer shards are shuffled together where they would not fit. None: as much as twice "
            "`window_shards` take.",
        ),
    ] = None
    lanes: Annotated[
        int | None,
        Field(
            ge=1,
            description="Spans that an epoch is cut into; a batch takes equal parts of all, and "
            "each device whole ones, so that it reads its share of the shards. A multiple of the "
            "devices. None: the largest power of two that divides batch_size, up to the shards "
            "that are shuffled together. With accumulate, a part is of some of the lanes: fewer "
            "lanes, of more shards each, mix it better.",
        ),
    ] = None
    balance: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Chips with a class that is on a smaller share f of the chips are seen "
            "more often, sqrt(balance / f) times an epoch, at most four times; 0: every chip once.",
        ),
    ] = 0.0
    on_corrupt: Annotated[
        Literal["fail", "skip"],
        Field(
            description="A shard that is missing or damaged ends the run, or is told in the log "
            "while chips of other shards take its place."
        ),
    ] = "fail"
    cache: Annotated[
        Path | None,
        Field(description="Folder where shards of a remote dataset are kept; none: not kept."),
    ] = None
    readers: Annotated[int, Field(ge=1, description="Threads that read shards ahead.")] = 1
    lr: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 5e-4
    weight_decay: Annotated[float, Field(ge=0, description="AdamW weight decay.")] = 0.05
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(description="AdamW betas."),
    ] = (0.9, 0.95)
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="Share of the steps with a rising rate.")
    ] = 0.1
    schedule: Annotated[
        Literal["cosine", "wsd"],
        Field(
            description="Of the rate after the warm-up: a half cosine to 0, or constant and then "
            "falling to 0 in a line (warm-up-stable-decay)."
        ),
    ] = "cosine"
    cooldown: Annotated[
        float, Field(gt=0, le=1, description="Share of the steps with a falling rate, for `wsd`.")
    ] = 0.2
    layer_decay: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Factor of the rate from each block of the image encoder to the one "
            "before it; 1: one rate. For going on from trained weights.",
        ),
    ] = 1.0
    clip: Annotated[float, Field(gt=0, description="Largest gradient norm.")] = 1.0
    ema: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Decay per step of the average of the weights that is evaluated and "
            "exported, such as 0.9999; none: the weights themselves.",
        ),
    ] = None
    accelerator: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], Field(description="Kind of device of the run.")
    ] = "auto"
    devices: Annotated[
        int,
        Field(
            ge=1,
            description="Devices on this machine, a process each. torchrun and srun begin the "
            "processes themselves: then as many as they say.",
        ),
    ] = 1
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp"],
        Field(
            description="How devices share the work: every one holds the whole model (`ddp`), or "
            "a part of each block's weights (`fsdp`); `auto`: `ddp` for more than one device."
        ),
    ] = "auto"
    compile: Annotated[bool, Field(description="Compile the model with torch.compile.")] = False
    checkpoint_activations: Annotated[
        bool,
        Field(description="Compute blocks again in the backward pass, to save memory."),
    ] = False
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"], Field(description="Arithmetic.")
    ] = "32-true"
    log_every: Annotated[int, Field(ge=1, description="Steps between log lines.")] = 10
    checkpoint_every: Annotated[int, Field(ge=1, description="Steps between checkpoints.")] = 500
    keep: Annotated[Keep, Field(description="Checkpoints that are kept.")] = Keep()
    evaluate_every: Annotated[
        int | None,
        Field(
            ge=1,
            description="Steps between evaluations: kNN on the validation split, pictures, a "
            "checkpoint; none: never.",
        ),
    ] = None
    evaluate_chips: Annotated[
        int, Field(ge=1, description="Chips of either split that an evaluation takes, about.")
    ] = 2000
    stop_within_s: Annotated[
        float,
        Field(
            gt=0,
            description="Time from SIGTERM to SIGKILL that the scheduler gives; a run that would "
            "need longer to write its checkpoint says so beforehand.",
        ),
    ] = 30.0
    wandb: Annotated[
        str | None,
        Field(min_length=1, description="Weights & Biases project that lines are sent to as well."),
    ] = None

    @model_validator(mode="after")
    def _shared_evenly(self) -> Self:
        parts = self.devices * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared evenly by devices {self.devices} "
                f"in accumulate {self.accumulate} parts: make it a multiple of {parts}"
            )
        if self.lanes and (self.batch_size % self.lanes or self.lanes % self.devices):
            raise ValueError(
                f"lanes {self.lanes} must be a multiple of devices {self.devices} and divide "
                f"batch_size {self.batch_size}"
            )
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup {self.warmup} and cooldown {self.cooldown} are more than all steps"
            )
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("strategy fsdp has no gradient scaler: use bf16-mixed or 32-true")
        return self

    @model_validator(mode="after")
    def _checkpoints_to_keep(self) -> Self:
        every = self.keep.every
        if every is not None and every % self.checkpoint_every:
            raise ValueError(
                f"keep.every is {every}, which is no multiple of checkpoint_every "
                f"{self.checkpoint_every}: no checkpoint is written then"
            )
        return self
