"""Chips as WebDataset: one tar a shard, one sample a chip.

A sample `<shard>_<chip>` has `image.npy`, `label_pixel.npy`, `label_patch.npy`, `label_region.npy`,
`graph.npz` (objects, tags as indices into `tags` of `json`, relations and patches, as a shard holds
them) and `json` (identity, place, time, texts of tags, licence).
"""

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from schemas.chips import Arrays, ShardPart, take_chips
from schemas.storage_local import LocalStorage

_ARRAYS = ("image", "label_pixel", "label_patch", "label_region")
_GRAPH = (
    "object_kind", "object_class", "object_osm", "object_size", "object_anchor",
    "object_tag_offset", "edge", "relation", "patch_offset", "patch", "patch_weight",
)  # fmt: skip


def write_webdataset(part: ShardPart, folder: Path) -> None:
    """Write `webdataset/<split>/<shard>.tar`.

    Raises GeoLinkError if it cannot be written.
    """
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in _samples(part):
            for suffix, content in files.items():
                # Owner and time stay zero: the same chips are the same bytes.
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, BytesIO(content))
    name = f"webdataset/{part.row.split}/{part.shard}.tar"
    LocalStorage(folder).write(name, data.getvalue())


def _samples(part: ShardPart) -> Iterator[tuple[str, dict[str, bytes]]]:
    texts = part.tag_texts()
    for n, stem in enumerate(part.stems):
        chip = take_chips(part.arrays, np.array([n]))
        used, tag = np.unique(chip["object_tag"], return_inverse=True)
        files = {f"{name}.npy": _npy(chip[name][0]) for name in _ARRAYS}
        graph = {name: chip[name] for name in _GRAPH} | {"object_tag": tag.astype(np.int32)}
        about = _about(part, n, chip) | {"tags": [texts[i] for i in used.tolist()]}
        files["graph.npz"] = _npz(graph)
        files["json"] = json.dumps(about, ensure_ascii=False).encode()
        yield f"{part.shard}_{stem}", files


def _about(part: ShardPart, n: int, chip: Arrays) -> dict[str, Any]:
    time = part.times[n]
    return {
        "chip": part.names[n],
        "shard": part.shard,
        "split": part.row.split,
        "epsg": int(chip["epsg"][0]),
        "bounds_utm": chip["bounds"][0].tolist(),
        "center_lonlat": chip["center_lonlat"][0].tolist(),
        "time": time.isoformat() if time else None,
        "scene": part.scenes[n],
        "valid": float(chip["valid"][0]),
        "bands": [band.name for band in part.info.sensor.bands],
        "classes": ["none", *part.info.taxonomy.names],
        "licence": part.info.licence,
        "attribution": list(part.info.attribution),
    }


def _npy(array: Any) -> bytes:
    data = BytesIO()
    np.save(data, array, allow_pickle=False)
    return data.getvalue()


def _npz(arrays: Arrays) -> bytes:
    data = BytesIO()
    np.savez_compressed(data, allow_pickle=False, **arrays)
    return data.getvalue()
