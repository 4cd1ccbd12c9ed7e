"""The model card of an exported encoder: what it is, what it was learnt from, how to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geolink.checkpoint import CheckpointMeta

_IMPORTS = {
    "timm": "import timm", "hf": "import timm, transformers", "onnx": "import onnxruntime",
    "torchgeo": "from pathlib import Path\n\n"
    "import torchgeo.models, torchgeo.trainers, torchvision",
}  # fmt: skip


def model_card(
    meta: CheckpointMeta,
    to: str,
    load: str,
    difference: float | None,
    validation: Mapping[str, Any],
    parameters: int,
) -> str:
    """The card as Markdown.

    Args:
        meta: of the checkpoint.
        to: what it was exported to; `hf` gets the hub's metadata on top.
        load: lines of Python that load it.
        difference: largest one between what that gives and GeoLink's own, if it was compared.
        validation: figures of the run's evaluation, if there was one.
        parameters: of the encoder.
    """
    c = meta.config.model
    unused = {"geolink2"} if c.variant == "paper" else None
    head = (
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\nlicense: other\n"
        "license_name: see-below\n"
        "tags: [remote-sensing, openstreetmap, timm, transformers]\n---\n\n"
        if to == "hf"
        else ""
    )
    compared = (
        "It was not compared with GeoLink's own output: onnxruntime was not there."
        if difference is None
        else f"On random images its tokens differ from GeoLink's own by at most {difference:.1e}."
    )
    sections = [
        f"{head}# Image encoder of GeoLink, ViT of width {c.embed_dim} and depth {c.depth}",
        f"A vision transformer for images of {c.image_size} × {c.image_size} pixels and {c.bands} "
        f"bands in patches of {c.patch_size} pixels, {parameters / 1e6:.1f} M parameters. "
        f"{_pretrained(meta)} This folder holds its image encoder only.",
        "## Load it",
        f"```python\n{_IMPORTS[to]}\n\n{load}\n```",
        f"`tokens` are [batch, {1 + (c.image_size // c.patch_size) ** 2}, {c.embed_dim}], the "
        "class token first, normed. The mean of all but the class token is the image embedding "
        f"that pretraining aligns with OpenStreetMap. {compared}",
        "## What goes in",
        _inputs(meta, to),
        "## What it was learnt from",
        _origin(meta),
        "## Results",
        _results(meta, validation),
        "## Licences",
        _licences(meta),
        "## Config",
        f"```json\n{c.model_dump_json(indent=2, exclude=unused)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _pretrained(meta: CheckpointMeta) -> str:
    c = meta.config.model
    return (
        f"Pretrained by GeoLink (`variant: {c.variant}`) on images and OpenStreetMap together: "
        f"masked image modelling ({c.mask_ratio:.0%} of the patches hidden), contrast between "
        "image and map, and hidden map objects told from both."
    )


def _inputs(meta: CheckpointMeta, to: str) -> str:
    rows = [
        f"| {n} | {band} | {mean:.6g} | {std:.6g} |"
        for n, (band, mean, std) in enumerate(zip(meta.bands, meta.mean, meta.std))
    ]
    lines = [
        "float32 [batch, band, y, x], y down; per band (value − mean) / std, of the values as the "
        "dataset stores them:",
        "\n".join(["| | band | mean | std |", "|---|---|---|---|", *rows]),
    ]
    if meta.nodata >= 0:
        lines.append(
            f"Pixels that are {meta.nodata} (no data) in every band become 0 after that, the mean."
        )
    if to in ("timm", "hf"):
        lines.append(
            "`mean` and `std` in `config.json` are these divided by 255, since timm's transforms "
            "divide pixels of 8 bits by 255 first."
        )
    return "\n\n".join(lines)


def _origin(meta: CheckpointMeta) -> str:
    code = f"GeoLink {meta.geolink}" + (f" ({meta.revision})" if meta.revision else "")
    if meta.published is not None:
        p = meta.published
        return (
            f"Weights of the file `{p.file}` (sha256 `{p.sha256}`), in the published layout "
            f"`{p.layout}`, converted by {code}. What they were trained on, the file does not say."
        )
    c = meta.config
    return (
        f"Dataset `{meta.dataset}`, snapshot {meta.snapshot}, split `{c.split}`; {meta.step:,} of "
        f"{meta.steps:,} steps of {c.batch_size} chips, seed {c.seed}; tags encoded by "
        f"`{meta.tag_encoder}`; {code}."
    )


def _results(meta: CheckpointMeta, validation: Mapping[str, Any]) -> str:
    figures = {k: v for k, v in validation.items() if isinstance(v, int | float) and k != "step"}
    if not figures and meta.validation is not None:
        figures = {"balanced_accuracy": meta.validation}
    if not figures:
        return "The run holds no evaluation up to this checkpoint; `geolink evaluate` makes one."
    step = validation.get("step", meta.step)
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(
        [f"kNN on the validation split after step {step:,}:", "", "| | |", "|---|---|", *rows]
    )


def _licences(meta: CheckpointMeta) -> str:
    if not meta.licences:
        return "The terms of the data are not stated."
    rows = [
        f"| {n.source} | {f'[{n.licence}]({n.url})' if n.url else n.licence or 'not stated'} | "
        f"{n.attribution or 'not stated'} |"
        for n in meta.licences
    ]
    table = ["| source | licence | attribution |", "|---|---|---|", *rows]
    return "\n".join(["Terms of the data that it was learnt from:", "", *table])
