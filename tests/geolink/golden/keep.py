"""Makes the two files beside it from the whole golden files: what fits into a repository.

    python tests/geolink/golden/keep.py ../shared/reference/golden tests/geolink/golden

The whole files are facts: what the published code gives for made-up inputs and random weights, on
a CPU in float32. They hold no trained weights. Left out are fixed positions, tensors stored twice,
the weights that no golden output depends on, and most rows of the largest outputs (`KEPT`).
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

PARTS = ("i_fusion_embedding", "ii_osm_encoder", "iii_aggregation", "iv_image", "v_contrastive",
         "vi_twoway", "input")  # fmt: skip
_LEVEL = (slice(None), slice(None), slice(None, None, 5), slice(None, None, 5))
KEPT = {
    "encoder_tokens": (slice(None), slice(None, None, 7)),
    "pred": (slice(None), slice(None, None, 20)),
    "fusion_pos_visible": (slice(None), slice(None, None, 7)),
    **{f"level{n}": _LEVEL for n in (0, 1, 2, 3)},
    "level3_all_nodes": _LEVEL,
}
"""Which rows of an output are kept."""
LEFT_OUT = ("img_encoder.pos_embed", "img_encoder.cls_token", "img_encoder.norm.", "patch_embed.",
            "img_pos_embed", "rec_img_pos_embed", "fusion_img_pos_embed", "osm_node_pred.",
            "type_attention.", "osm_mask_token.")  # fmt: skip
MEAN = np.float32([0.485, 0.456, 0.406])[:, None, None]
STD = np.float32([0.229, 0.224, 0.225])[:, None, None]


def planes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Bytes of float32 [N] as [4, N], which compress better."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4).T)


def from_planes(bytes_: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The inverse of `planes`."""
    return np.ascontiguousarray(bytes_.T).view(np.float32)[:, 0]


def normalised(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images of 8 bits as the golden input has them."""
    return (stored.astype(np.float32) / np.float32(255) - MEAN) / STD


def main(source: Path, target: Path) -> None:
    """Write `weights.npz` and `outputs.npz`."""
    weights = {
        name: value
        for name, value in load_file(source / "weights_lin.safetensors").items()
        if not name.startswith(LEFT_OUT)
    }
    values = np.concatenate([value.reshape(-1) for value in weights.values()])
    shapes = [" ".join([name, *map(str, value.shape)]) for name, value in weights.items()]
    np.savez_compressed(target / "weights.npz", shapes=np.array(shapes), planes=planes(values))

    outputs = {}
    for part in PARTS:
        with np.load(source / f"batchA_{part}.npz") as arrays:
            for name in arrays:
                value = arrays[name]
                outputs[f"{part}/{name}"] = value[KEPT[name]] if name in KEPT else value
    images = outputs["input/images"]
    stored = np.rint((images * STD + MEAN) * 255).astype(np.uint8)
    assert np.array_equal(normalised(stored), images)
    outputs["input/images"] = stored
    np.savez_compressed(target / "outputs.npz", **outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
