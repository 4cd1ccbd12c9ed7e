"""Run by a test where TorchGeo is: reads an export as its users do, and prints what it got.

    python read_with_torchgeo.py EXPORT

TorchGeo's own classes find the files, their CRS, places and times, and cut pairs of picture and
mask from both at the same place.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, stack_samples
from torchgeo.samplers import GridGeoSampler


class Images(RasterDataset):
    """Chips."""

    filename_glob = "*.tif"
    filename_regex = r".*_(?P<date>\d{8}T\d{6})\.tif"
    date_format = "%Y%m%dT%H%M%S"


class Labels(RasterDataset):
    """Masks."""

    is_image = False
    filename_glob = "*.png"
    filename_regex = r".*_(?P<date>\d{8}T\d{6})\.png"
    date_format = "%Y%m%dT%H%M%S"


def main(folder: Path) -> None:
    """Print sums over every chip-sized pair as JSON."""
    images, labels = Images(folder / "images"), Labels(folder / "labels")
    both = images & labels
    sampler = GridGeoSampler(both, size=192, stride=192)
    loader = DataLoader(both, batch_size=1, sampler=sampler, collate_fn=stack_samples)
    seen = [(b["image"].to(torch.int64), b["mask"].to(torch.int64)) for b in loader]
    found = {
        "files": [len(images), len(labels), len(both)],
        "crs": images.crs.to_epsg(),
        "resolution": list(images.res),
        "shape": list(seen[0][0].shape),
        "pairs": sorted([int(i.sum()), int(m.sum())] for i, m in seen),
        "first": str(both.index.index.left.min()),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
