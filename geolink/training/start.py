"""Weights that a run starts from: an image encoder of timm, a published file, a checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from geolink.checkpoint import CheckpointMeta, load_model
from geolink.models.build import PretrainModel
from geolink.models.published import load_published
from geolink.reader import Dataset
from geolink.training.run import first_difference
from schemas.errors import GeoLinkError

_TIMM = "timm:"
_OWN = {"cls_token": "cls_token", "pos_embed": "img_pos_embed",
        "norm.weight": "img_norm.weight", "norm.bias": "img_norm.bias"}  # fmt: skip
"""Where the model holds what a timm VisionTransformer names otherwise."""


def start_from(start: str, model: PretrainModel, dataset: Dataset) -> str:
    """Put weights into a new model; returns what was put there, for people.

    Args:
        start: `timm:NAME` (the image encoder of the timm model, fetched if need be, its patch
            embedding and positions brought to the model's bands and size); a file in a published
            layout; a checkpoint or run folder of GeoLink.
        model: of the same sizes.
        dataset: what will be learnt from.

    Raises GeoLinkError: no such weights, of other sizes, or learnt from other data: bands, tag
    encoder, classes.
    """
    if start.startswith(_TIMM):
        count = _from_timm(start.removeprefix(_TIMM), model)
        return f"started from {count} tensors of the image encoder of {start}"
    path = Path(start)
    if path.is_file():
        model.load_state_dict(load_published(path, model.config).state_dict())
        return f"started from the published weights in {path}"
    trained, meta = load_model(path)
    _check_same_data(path, meta, model, dataset)
    model.load_state_dict(trained.state_dict())
    return f"started from the weights of {path} after step {meta.step}"


def _from_timm(name: str, model: PretrainModel) -> int:
    import timm

    c = model.config
    try:
        encoder = timm.create_model(
            name, pretrained=True, num_classes=0, in_chans=c.bands, img_size=c.image_size
        )
    except Exception as error:
        raise GeoLinkError(
            f"cannot start from {_TIMM}{name}: {str(error).splitlines()[0]}"
        ) from error
    source = {_OWN.get(n, f"img_encoder.{n}"): v for n, v in encoder.state_dict().items()}
    target = model.state_dict()
    expected = {n for n in target if n.startswith(("img_encoder.blocks.", "img_encoder.patch_"))}
    _fits(f"{_TIMM}{name}", source, {n: target[n] for n in (*expected, *_OWN.values())})
    model.load_state_dict(source, strict=False)
    return len(source)


def _fits(start: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    problems = [f"{n} is missing" for n in expected if n not in found]
    problems += [f"{n} is not the model's" for n in found if n not in expected]
    problems += [
        f"{n} has shape {list(found[n].shape)}, not {list(v.shape)}"
        for n, v in expected.items()
        if n in found and found[n].shape != v.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise GeoLinkError(
            f"{start} does not fit the model (its vit or embed_dim, depth, num_heads, patch_size): "
            f"{'; '.join(sorted(problems)[:3])}{more}"
        )


def _check_same_data(
    path: Path, meta: CheckpointMeta, model: PretrainModel, dataset: Dataset
) -> None:
    theirs, ours, info = meta.config.model, model.config, dataset.info
    bands = tuple(band.name for band in info.sensor.bands)
    classes = info.taxonomy.names
    if meta.bands != bands:
        raise GeoLinkError(
            f"{path} was trained on bands {', '.join(meta.bands)}, but {dataset.path} has "
            f"{', '.join(bands)}: start from other weights"
        )
    if meta.tag_encoder != dataset.tag_encoder:
        raise GeoLinkError(
            f"{path} was trained with tags encoded by {meta.tag_encoder}, but those of "
            f"{dataset.path} are encoded by {dataset.tag_encoder}: start from other weights"
        )
    if meta.classes is not None and meta.classes != classes:
        other = next(
            (c for c in (*meta.classes, *classes) if (c in meta.classes) != (c in classes)), None
        )
        raise GeoLinkError(
            f"{path} was trained with another taxonomy than {dataset.path} has"
            + (f" ({other!r} is a class of one only)" if other else " (another order of classes)")
            + ": start from other weights"
        )
    other_model = first_difference(theirs.model_dump(), ours.model_dump(), _FREE)
    if other_model is not None:
        name, value, mine = other_model
        if not name.startswith("geolink2.") or ours.variant == "geolink2":
            raise GeoLinkError(
                f"{path} has model.{name} {value}, but the config says {mine}: "
                "give the same value, or start from other weights"
            )


_FREE = {
    "mask_ratio", "node_mask_ratio", "max_masked_nodes", "temperature", "contrast_weight",
    "consistency_weight", "vit",
}  # fmt: skip
"""Fields of a model's config that its weights do not depend on."""
