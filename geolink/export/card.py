"""The model card of an exported encoder: what it is, what it was learnt from, how to feed it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geolink.checkpoint import CheckpointMeta

Results = dict[str, dict[str, str]]
"""By title, rows of a table."""

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
    results: Results,
    parameters: int,
    prefix: int,
) -> str:
    """The card as Markdown.

    Args:
        meta: of the checkpoint.
        to: what it was exported to; `hf` gets the hub's metadata on top.
        load: lines of Python that load it.
        difference: largest one between what that gives and GeoLink's own, if it was compared.
        results: evaluations of the checkpoint (`read_results`).
        parameters: of the encoder.
        prefix: tokens before those of the patches.
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
        f"`tokens` are [batch, {prefix + (c.image_size // c.patch_size) ** 2}, {c.embed_dim}], the "
        f"class token first{' and registers after it' if prefix > 1 else ''}, normed. The mean of "
        "the patches' tokens is the image embedding "
        f"that pretraining aligns with OpenStreetMap. {compared}",
        "## What goes in",
        _inputs(meta, to),
        "## What it was learnt from",
        _origin(meta),
        "## Results",
        _results(meta, results),
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


def read_results(run: Path, meta: CheckpointMeta) -> Results:
    """What the run's folder says of the checkpoint: the last evaluation in its log, and files that
    `geolink evaluate` wrote there. Empty for converted weights.
    """
    results: Results = {}
    if meta.published is not None:
        return results
    for record in _records(run / "log.jsonl"):
        if "validation" in record and record["step"] <= meta.step:
            title = f"kNN on the validation split, after step {record['step']:,}"
            # The one before it is of less interest.
            results = {title: _figures(record["validation"])}
    for path in sorted(run.glob("*/result.json")):
        for record in _records(path, whole=True):
            if "scores" not in record or record.get("step") != meta.step:
                continue
            measure = record["measures"][0]
            title = (
                f"{record['task']} on {record['held_out']:,} images of {record['dataset']}, "
                f"{record['classes']} classes: {measure.replace('_', ' ')}, 95 % interval"
            )
            results[title] = {
                name: f"{point['score'][measure]:.1%}, {point['interval'][measure][0]:.1%} to "
                f"{point['interval'][measure][1]:.1%}"
                for name, point in record["scores"].items()
            }
    return results


def _records(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line or one in all; what is none is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = []
    for part in [text] if whole else text.splitlines():
        try:
            record = json.loads(part)
        except ValueError:
            continue
        records += [record] if isinstance(record, dict) else []
    return records


def _figures(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        k.replace("_", " "): f"{v:.4g}" for k, v in values.items() if isinstance(v, int | float)
    }


def _results(meta: CheckpointMeta, results: Results) -> str:
    if not results and meta.validation is not None:
        results = {"kNN on the validation split": _figures({"balanced_accuracy": meta.validation})}
    if not results:
        return "The run holds no evaluation of this checkpoint; `geolink evaluate` makes one."
    return "\n\n".join(
        "\n".join(
            [
                f"{title}:",
                "",
                "| what | figure |",
                "|---|---|",
                *(f"| {k} | {v} |" for k, v in rows.items()),
            ]
        )
        for title, rows in results.items()
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
