"""Run by a test where TorchGeo is: loads an exported encoder as its model card says.

    python encode_with_torchgeo.py EXPORT IMAGES.npy TOKENS.npy

Runs the card's own lines, and writes what they give for the images.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch


def main(folder: Path, images: Path, tokens: Path) -> None:
    """Write the tokens, and complain if the task's encoder is another one."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    names = {"images": torch.from_numpy(np.load(images))}
    torch.manual_seed(0)
    with torch.no_grad():
        exec(code.replace("FOLDER", str(folder)), names)
    encoder = names["encoder"].state_dict()
    task = names["task"].model.state_dict()
    assert all(torch.equal(value, task[name]) for name, value in encoder.items())
    np.save(tokens, names["tokens"].numpy())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
