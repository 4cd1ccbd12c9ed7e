"""Tags: ids that need no coordination, a vocabulary by union, one embedding per distinct tag."""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pipelines.ragged import ranks
from pipelines.threads import side_by_side
from schemas.dataset import (
    SnapshotRow,
    read_arrays,
    read_snapshot,
    snapshot_numbers,
    tag_table_name,
    vocabulary_name,
)
from schemas.errors import GeoLinkError, NetworkFault
from schemas.parquet import read_parquet
from schemas.storage import Location, Storage, storage, writing

if TYPE_CHECKING:
    from pipelines.features import Features
    from pipelines.objects import Objects


def tag_id(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Ids of `key=value` texts: the first 8 bytes, big endian, of BLAKE2b of their UTF-8."""
    digests = b"".join(hashlib.blake2b(t.encode()).digest()[:8] for t in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def by_id(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Order of distinct texts by tag id, and the ids in that order.

    Raises GeoLinkError if two texts have the same id.
    """
    ids = tag_id(texts)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    same = np.flatnonzero(ids[1:] == ids[:-1])
    if len(same):
        first, second = (texts[order[same[0] + i]] for i in (0, 1))
        raise GeoLinkError(
            f"tags {first!r} and {second!r} have the same id; leave one of them out with drop_keys"
        )
    return order, ids


def tag_arrays(features: "Features", objects: "Objects") -> dict[str, NDArray[Any]]:
    """The tags of a shard's objects as shard arrays; only tags that an object has are listed."""
    lengths = np.diff(features.tag_offset)[objects.source]
    entries = np.repeat(features.tag_offset[objects.source], lengths) + ranks(lengths)
    used, tag = np.unique(features.tag[entries], return_inverse=True)
    texts = [features.tags[i] for i in used.tolist()]
    encoded = [t.encode() for t in texts]
    return {
        "object_tag_offset": np.r_[0, np.cumsum(lengths)].astype(np.int64),
        "object_tag": tag.astype(np.int32),
        "tag": tag_id(texts),
        "tag_text_offset": np.r_[0, np.cumsum([len(t) for t in encoded])].astype(np.int64),
        "tag_text": np.frombuffer(b"".join(encoded), np.uint8),
    }


class Vocabulary(NamedTuple):
    """Distinct tags by id, and how many objects carry each."""

    ids: NDArray[np.uint64]
    """[V] ascending."""
    texts: list[str]
    """[V] `key=value`."""
    objects: NDArray[np.int64]
    """[V] objects of the shards that carry the tag."""

    def key(self) -> str:
        """Content key: the same for the same tags and counts."""
        digest = hashlib.blake2b(self.ids.tobytes() + self.objects.tobytes(), digest_size=16)
        return digest.hexdigest()


def shard_vocabulary(arrays: dict[str, NDArray[Any]]) -> Vocabulary:
    """The tags of one shard from its arrays `object_tag`, `tag`, `tag_text_offset`, `tag_text`."""
    data, ends = arrays["tag_text"].tobytes(), arrays["tag_text_offset"].tolist()
    texts = [data[a:b].decode() for a, b in pairwise(ends)]
    objects = np.bincount(arrays["object_tag"], minlength=len(texts))
    return Vocabulary(arrays["tag"], texts, objects.astype(np.int64))


def merge_vocabularies(parts: Iterable[Vocabulary]) -> Vocabulary:
    """The union; counts add up. It does not depend on the order of the parts.

    Raises GeoLinkError if two different tags have the same id.
    """
    total: dict[str, int] = {}
    for part in parts:
        for text, n in zip(part.texts, part.objects.tolist(), strict=True):
            total[text] = total.get(text, 0) + n
    texts = [text for text, n in total.items() if n]
    order, ids = by_id(texts)
    objects = np.array([total[text] for text in texts], np.int64)[order]
    return Vocabulary(ids, [texts[i] for i in order.tolist()], objects)


def write_vocabulary(dataset: Location, rows: Sequence[SnapshotRow], encoder: str) -> str:
    """Write the vocabulary of a snapshot's shards and its embeddings; returns its content key.

    Only tags that the latest snapshot's table lacks are encoded, and only shards are read in which
    it differs. Files that are there are left.

    Raises GeoLinkError: an encoder that cannot be had, a damaged shard, two tags with one id, or a
    folder that cannot be written.
    """
    vocabulary = _vocabulary_of(dataset, rows)
    key = vocabulary.key()
    table_name = tag_table_name(key, encoder)
    files = storage(dataset)
    with writing(str(dataset)):
        if not _renewed(files, vocabulary_name(key)):
            files.create(vocabulary_name(key), _vocabulary_bytes(vocabulary))
        if not _renewed(files, table_name):
            known = _latest_table(dataset, encoder)
            buffer = io.BytesIO()
            np.save(buffer, extend_table(vocabulary, encoder, known), allow_pickle=False)
            files.create(table_name, buffer.getvalue())
    return key


def _vocabulary_of(dataset: Location, rows: Sequence[SnapshotRow]) -> Vocabulary:
    """The vocabulary of some shards, from the latest snapshot's where most of them are in that."""
    after = {row.path for row in rows if row.objects}
    known = read_snapshot(dataset) if snapshot_numbers(dataset) else None
    before = {row.path for row in known.rows if row.objects} if known else set()
    base = _known_vocabulary(dataset, known.vocabulary) if known else None
    if base is None or len(before ^ after) >= len(after):
        return merge_vocabularies(side_by_side(partial(_tags_of, dataset), sorted(after)))
    added = side_by_side(partial(_tags_of, dataset), sorted(after - before))
    gone = side_by_side(partial(_tags_of, dataset), sorted(before - after))
    taken = (part._replace(objects=-part.objects) for part in gone)
    try:
        return merge_vocabularies(chain([base], taken, added))
    except NetworkFault:
        raise
    except GeoLinkError:  # a shard that is needed no more may be damaged; one that is, is told
        return merge_vocabularies(side_by_side(partial(_tags_of, dataset), sorted(after)))


def _tags_of(dataset: Location, path: str) -> Vocabulary:
    names = ("object_tag", "tag", "tag_text_offset", "tag_text")
    return shard_vocabulary(read_arrays(dataset, path, names)[0])


def _known_vocabulary(dataset: Location, key: str) -> Vocabulary | None:
    """A vocabulary that was written; None if it is not there, or not what its key says."""
    try:
        data = storage(dataset).read(vocabulary_name(key))
        table = read_parquet(data, ["id", "key", "value", "objects"])
        pairs = zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True)
        texts = [f"{k}={v}" for k, v in pairs]
        found = Vocabulary(table["id"].to_numpy(), texts, table["objects"].to_numpy())
    except (OSError, KeyError, pa.ArrowException):
        return None
    return found if found.key() == key else None


def _renewed(files: Storage, name: str) -> bool:
    """Whether a file is there; if so it is made young, so that `geolink gc` leaves it."""
    try:
        files.touch(name)
    except FileNotFoundError:
        return False
    return True


class TagTable(NamedTuple):
    """Embeddings of tags."""

    ids: NDArray[np.uint64]
    """[V] ascending."""
    table: NDArray[np.float16]
    """[V, D]."""


def extend_table(
    vocabulary: Vocabulary, encoder: str, known: TagTable | None
) -> NDArray[np.float16]:
    """Embeddings [V, D] of a vocabulary; rows that `known` has are taken from it.

    Raises GeoLinkError if the encoder cannot be had.
    """
    if known is None or not len(known.ids):
        return encode(vocabulary.texts, encoder)
    at = np.minimum(np.searchsorted(known.ids, vocabulary.ids), len(known.ids) - 1)
    new = np.flatnonzero(known.ids[at] != vocabulary.ids)
    table: NDArray[np.float16] = known.table[at]
    if len(new):
        table[new] = encode([vocabulary.texts[i] for i in new.tolist()], encoder)
    return table


def _latest_table(dataset: Location, encoder: str) -> TagTable | None:
    """Table of the latest snapshot; None where there is none of this encoder."""
    if not snapshot_numbers(dataset):
        return None
    snapshot = read_snapshot(dataset)
    files = storage(dataset)
    name = tag_table_name(snapshot.vocabulary, encoder)
    if not files.exists(name):
        return None
    try:
        vocabulary = files.read(vocabulary_name(snapshot.vocabulary))
        ids = read_parquet(vocabulary, ["id"])["id"].to_numpy()
        table = np.load(io.BytesIO(files.read(name)), allow_pickle=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise GeoLinkError(
            f"tag table {dataset}/{name} is damaged ({error}); delete it and build again"
        ) from error
    return TagTable(ids, table)


def _vocabulary_bytes(vocabulary: Vocabulary) -> bytes:
    pairs = [text.partition("=") for text in vocabulary.texts]
    table = pa.table(
        {
            "id": pa.array(vocabulary.ids, pa.uint64()),
            "key": pa.array([key for key, _, _ in pairs], pa.string()),
            "value": pa.array([value for _, _, value in pairs], pa.string()),
            "objects": pa.array(vocabulary.objects, pa.int64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@dataclass(frozen=True)
class TagEncoder:
    """A text encoder of tags."""

    dimensions: int
    encode: Callable[[Sequence[str]], NDArray[np.float32]]
    """`key=value` texts [V] to vectors [V, D]; a text's vector does not depend on the others."""


def encode(texts: Sequence[str], encoder: str) -> NDArray[np.float16]:
    """Embeddings [V, D] of `key=value` texts.

    Raises GeoLinkError if the encoder is unknown or cannot be had here.
    """
    if encoder not in ENCODERS:
        raise GeoLinkError(f"unknown tag encoder {encoder!r}; known: {', '.join(ENCODERS)}")
    chosen = ENCODERS[encoder]
    if not texts:
        return np.zeros((0, chosen.dimensions), np.float16)
    return chosen.encode(texts).astype(np.float16)


KEY_WEIGHT = 0.25
"""Weight of a tag's key beside its value in `wordllama` embeddings.

Of 45 hand-made statements "a is closer to b than to c" (school to university than to forest, forest
to wood than to retail across keys, ...) 42 hold at 0 to 0.3, 43 at 0.4 and 0.5, 34 at 0.75 and 29
when key and value are one text. More weight keeps keys apart, less weight finds kin across keys.
"""

_CHUNK = 65_536


def _wordllama(texts: Sequence[str]) -> NDArray[np.float32]:
    """Static word vectors, 256-d: unit vector of the value + `KEY_WEIGHT` * that of the key.

    Underscores and colons are spaces. The value `yes` says nothing of its own: the key alone is
    encoded. Weights and tokenizer are those in the wordllama package (MIT).
    """
    pairs = [text.replace("_", " ").replace(":", " ").partition("=") for text in texts]
    keys = sorted({key for key, _, _ in pairs})
    values = [key if value == "yes" else value for key, _, value in pairs]
    at = {key: i for i, key in enumerate(keys)}
    key_part = _unit_means(keys)[[at[key] for key, _, _ in pairs]]
    value_part = np.concatenate(
        [_unit_means(values[i : i + _CHUNK]) for i in range(0, len(values), _CHUNK)]
    )
    return _unit(value_part + np.float32(KEY_WEIGHT) * key_part)


def _unit_means(texts: Sequence[str]) -> NDArray[np.float32]:
    """Mean of the vectors of each text's tokens, at unit length (0 for an empty text)."""
    vectors, tokenizer = _wordllama_files()
    tokens = [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    ends = np.cumsum([0, *map(len, tokens)])
    index = np.fromiter(chain.from_iterable(tokens), np.int64, count=ends[-1])
    ones = np.ones(len(index), np.float32)
    return _unit(csr_array((ones, index, ends), shape=(len(texts), len(vectors))) @ vectors)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.sqrt(np.einsum("vd,vd->v", vectors, vectors))[:, None]
    unit: NDArray[np.float32] = vectors / np.maximum(length, np.float32(1e-12))
    return unit


@lru_cache(maxsize=1)
def _wordllama_files() -> tuple[NDArray[np.float32], Any]:
    """Token vectors [tokens, 256] and the tokenizer."""
    spec = find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise GeoLinkError("tag encoder 'wordllama' needs the package wordllama; install it")
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    # Its own loader would download a tokenizer that lies in the package.
    folder = Path(spec.origin).parent
    weights = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
    path = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return weights.astype(np.float32), tokenizer


def _clip(texts: Sequence[str]) -> NDArray[np.float32]:
    """Text model of CLIP ViT-B/16, 512-d, as the paper encodes tags.

    It needs torch, which this package does not import: it runs as a process of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "vectors.npy"
        done = subprocess.run(
            [sys.executable, "-m", "geolink.clip_text", str(result)],
            input=json.dumps(list(texts)), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise GeoLinkError(f"tag encoder 'clip-vit-b-16' cannot be used: {reason}")
        vectors: NDArray[np.float32] = np.load(result, allow_pickle=False)
    return vectors


ENCODERS: dict[str, TagEncoder] = {
    "wordllama": TagEncoder(256, _wordllama),
    "clip-vit-b-16": TagEncoder(512, _clip),
}
"""Tag encoders by the name that goes into a config."""
