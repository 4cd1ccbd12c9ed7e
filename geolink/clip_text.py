"""CLIP's text model over tags, as the paper encodes them: `python -m geolink.clip_text OUT.npy`.

Reads a JSON list of `key=value` texts from standard input and writes their vectors, float32
[V, 512]. A process of its own, because building datasets must not import torch.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "openai/clip-vit-base-patch16"
_BATCH = 256


def load(name: str = MODEL) -> tuple[Any, Any]:
    """Tokenizer and text model by name or folder.

    Raises OSError if the weights are neither in the Hugging Face cache nor can be downloaded.
    """
    transformers = import_module("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
    return tokenizer, transformers.CLIPTextModel.from_pretrained(name).eval()


def encode(texts: list[str], tokenizer: Any, model: Any) -> NDArray[np.float32]:
    """Mean of the last hidden states after the first token of each `key:value`: float32 [V, D].

    Facts of the published code; padding takes no part, since attention looks back only.
    """
    import torch

    out = []
    for i in range(0, len(texts), _BATCH):
        named = [text.replace("=", ":", 1) for text in texts[i : i + _BATCH]]
        tokens = tokenizer(named, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[:, 1:]
        used = tokens["attention_mask"][:, 1:, None].to(hidden.dtype)
        out.append(((hidden * used).sum(1) / used.sum(1)).numpy())
    return np.concatenate(out).astype(np.float32)


def main() -> None:
    """Encode the texts on standard input; the last line on standard error says what failed."""
    texts = json.load(sys.stdin)
    try:
        tokenizer, model = load()
    except ImportError as error:
        sys.exit(
            f"{error.name} is not installed; `pip install transformers` in an environment with "
            "torch, or set tag_encoder to wordllama"
        )
    except OSError:
        sys.exit(
            f"the weights of {MODEL} are not there; download them once where there is network "
            f"(`huggingface-cli download {MODEL}`) and point HF_HOME to that cache, or set "
            "tag_encoder to wordllama"
        )
    np.save(Path(sys.argv[1]), encode(texts, tokenizer, model), allow_pickle=False)


if __name__ == "__main__":
    main()
