"""Tags: ids, the vocabulary of a snapshot, and their embeddings."""

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from geolink.clip_text import encode as encode_clip
from pipelines import tags
from pipelines.features import make_features
from pipelines.objects import clip
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from pipelines.tags import (
    ENCODERS,
    TagEncoder,
    TagTable,
    Vocabulary,
    by_id,
    encode,
    extend_table,
    merge_vocabularies,
    shard_vocabulary,
    tag_arrays,
    tag_id,
    write_vocabulary,
)
from schemas.config import ObjectOptions
from schemas.dataset import read_arrays, tag_table_name, vocabulary_name
from schemas.errors import GeoLinkError
from schemas.grid import Block
from schemas.taxonomy import default_taxonomy
from tests.shards import make_info, random_arrays, store_row

Count = dict[str, int]


def _vocabulary(counts: Count) -> Vocabulary:
    texts = sorted(counts, key=lambda t: int(tag_id([t])[0]))
    return Vocabulary(tag_id(texts), texts, np.array([counts[t] for t in texts], np.int64))


def test_an_id_is_that_of_every_other_build() -> None:
    # `printf building=yes | b2sum | cut -c1-16`, and so on: ids are on disk for good.
    assert [f"{i:016x}" for i in tag_id(["building=yes", "café=oui"]).tolist()] == [
        "51c9c8a0b867a332", "475af7ec2ae498c2",
    ]  # fmt: skip


def test_two_tags_with_one_id_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "tag_id", lambda texts: np.array([len(t) for t in texts], np.uint64))
    with pytest.raises(GeoLinkError, match="tags 'a=1' and 'b=2' have the same id"):
        by_id(["longer=1", "a=1", "b=2"])
    parts = [Vocabulary(np.array([3], np.uint64), [t], np.array([1])) for t in ("a=1", "b=2")]
    with pytest.raises(GeoLinkError, match="same id"):
        merge_vocabularies(parts)
    assert len(merge_vocabularies([parts[0], parts[0]]).ids) == 1


def test_a_shard_lists_the_tags_that_its_objects_have() -> None:
    rng = np.random.default_rng(0)
    names = ["building=yes", "café=oui", "highway=path", "a=b=c", "never=1"]
    chosen = [sorted(rng.choice(4, rng.integers(1, 4), replace=False)) for _ in range(50)]
    texts = [[names[i] for i in row] for row in chosen] + [["never=1"]]
    xy = [*rng.uniform(1, 9, (50, 2)).tolist(), [99.0, 99.0]]
    features = make_features(
        shapely.points(xy), np.arange(51) * 4, np.cumsum([0, *map(len, texts)]),
        [t for row in texts for t in row], default_taxonomy(), np.arange(51), Counter(),
    )  # fmt: skip
    objects = clip(features, np.array([[0.0, 0.0, 10.0, 10.0]]), ObjectOptions())
    arrays = tag_arrays(features, objects)
    ends = arrays["tag_text_offset"]
    listed = [arrays["tag_text"][a:b].tobytes().decode() for a, b in pairwise(ends)]
    assert arrays["tag"].tolist() == tag_id(listed).tolist() == sorted(tag_id(names[:4]).tolist())
    offset = arrays["object_tag_offset"]
    for m, source in enumerate(objects.source):
        row = arrays["object_tag"][offset[m] : offset[m + 1]]
        assert {listed[i] for i in row} == set(texts[source])
        assert (np.diff(row) > 0).all()
    found = shard_vocabulary(arrays)
    expected = Counter(t for row in texts[:50] for t in row)
    assert dict(zip(found.texts, found.objects.tolist(), strict=True)) == expected


_COUNTS = st.dictionaries(st.sampled_from([f"k{i}=v" for i in range(12)]), st.integers(1, 9))


@settings(max_examples=30, deadline=None)
@given(st.lists(_COUNTS, max_size=6), st.randoms())
def test_the_union_does_not_depend_on_order(counts: list[Count], random: object) -> None:
    merged = merge_vocabularies(_vocabulary(c) for c in counts)
    total: Counter[str] = Counter()
    for c in counts:
        total.update(c)
    assert dict(zip(merged.texts, merged.objects.tolist(), strict=True)) == total
    assert (np.diff(merged.ids.astype(object)) > 0).all()
    shuffled = counts[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    # A merge of merges is the merge.
    halves = [shuffled[::2], shuffled[1::2]]
    again = merge_vocabularies(merge_vocabularies(map(_vocabulary, h)) for h in halves)
    assert again.key() == merged.key()
    assert again.texts == merged.texts


CLOSER = [
    ("amenity=school", "amenity=university", "landuse=forest"),
    ("landuse=forest", "natural=wood", "landuse=retail"),
    ("highway=motorway", "highway=trunk", "landuse=forest"),
    ("waterway=river", "waterway=stream", "building=yes"),
    ("natural=water", "waterway=river", "building=house"),
    ("leisure=park", "leisure=garden", "railway=rail"),
    ("building=church", "amenity=place_of_worship", "building=garage"),
    ("leisure=swimming_pool", "natural=water", "leisure=park"),
    ("building=yes", "building=house", "highway=yes"),
    ("surface=asphalt", "surface=concrete", "shop=bakery"),
]


@pytest.mark.parametrize(("tag", "near", "far"), CLOSER)
def test_kin_are_closer_than_strangers(tag: str, near: str, far: str) -> None:
    a, b, c = encode([tag, near, far], "wordllama").astype(np.float64)
    assert a @ b > a @ c


def test_an_embedding_does_not_depend_on_the_other_tags() -> None:
    texts = [f"name{i % 7}=the {i} of many" for i in range(300)] + ["x=", "=", "ö=ü"]
    together = encode(texts, "wordllama")
    assert together.shape == (303, 256)
    assert together.dtype == np.float16
    assert np.isfinite(together).all()
    for i in (0, 17, 299, 302):
        assert np.array_equal(encode([texts[i]], "wordllama")[0], together[i])
    assert encode([], "wordllama").shape == (0, 256)


def test_only_new_tags_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.array([[len(t), 1] for t in texts], np.float32)

    monkeypatch.setitem(ENCODERS, "spy", TagEncoder(2, spy))
    before, after = _vocabulary({"a=1": 1, "bb=2": 1}), _vocabulary({"bb=2": 4, "ccc=3": 1})
    known = TagTable(before.ids, extend_table(before, "spy", None))
    asked.clear()
    table = extend_table(after, "spy", known)
    assert asked == ["ccc=3"]
    assert table.tolist() == [[len(t), 1] for t in after.texts]


def test_a_snapshots_vocabulary_counts_the_objects_of_its_shards(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, make_info())
    rows = [store_row(tmp_path, Block(32632, n, 9), random_arrays(n)) for n in range(3)]
    first = write_vocabulary(tmp_path, rows[:2], "wordllama")
    publish(tmp_path, rows[:2], first, make_info())
    key = write_vocabulary(tmp_path, rows[::-1], "wordllama")
    assert key != first
    expected: Counter[str] = Counter()
    for row in rows:
        a = read_arrays(tmp_path, row.path)[0]
        for m in range(row.objects):
            for t in a["object_tag"][a["object_tag_offset"][m] : a["object_tag_offset"][m + 1]]:
                b, e = a["tag_text_offset"][t : t + 2]
                expected[a["tag_text"][b:e].tobytes().decode()] += 1
    table = pq.read_table(tmp_path / vocabulary_name(key)).to_pylist()
    assert {f"{r['key']}={r['value']}": r["objects"] for r in table} == expected
    ids = [r["id"] for r in table]
    assert ids == sorted(ids) == tag_id([f"{r['key']}={r['value']}" for r in table]).tolist()
    vectors = np.load(tmp_path / tag_table_name(key, "wordllama"))
    # Grown from the first snapshot's table or made at once: the same bytes.
    whole = encode([f"{r['key']}={r['value']}" for r in table], "wordllama")
    assert np.array_equal(vectors, whole)
    files = {p.name: p.read_bytes() for p in (tmp_path / "tags").iterdir() if p.is_file()}
    assert write_vocabulary(tmp_path, rows, "wordllama") == key
    assert {p.name: p.read_bytes() for p in (tmp_path / "tags").iterdir() if p.is_file()} == files


def test_a_vocabulary_grown_and_shrunk_is_the_one_made_at_once(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, make_info())
    rows = [store_row(tmp_path, Block(32632, n, 9), random_arrays(n)) for n in range(6)]
    publish(tmp_path, rows[:5], write_vocabulary(tmp_path, rows[:5], "wordllama"), make_info())
    once = tmp_path / "once"
    for row in rows:
        shutil.copytree(tmp_path / row.path, once / row.path)
    for kept in (rows[1:], rows[:5], rows[1:5]):
        key = write_vocabulary(tmp_path, kept, "wordllama")
        assert write_vocabulary(once, kept, "wordllama") == key
        name = vocabulary_name(key)
        assert (tmp_path / name).read_bytes() == (once / name).read_bytes()
    # A shard that is left out needs not be readable.
    shutil.rmtree(tmp_path / rows[0].path)
    assert write_vocabulary(tmp_path, rows[1:5], "wordllama") == key


def test_an_encoder_that_cannot_be_had_is_told() -> None:
    with pytest.raises(GeoLinkError, match=r"unknown tag encoder 'bert'; known: wordllama, clip"):
        encode(["a=b"], "bert")


def test_clip_without_its_weights_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "/nowhere")
    with pytest.raises(GeoLinkError, match=r"'clip-vit-b-16' cannot be used: .*wordllama"):
        encode(["a=b"], "clip-vit-b-16")


def test_clip_takes_the_mean_of_the_states_after_the_first_token() -> None:
    torch = pytest.importorskip("torch")
    lengths = {"highway:path": 4, "a:b=c": 2}

    def tokenizer(texts: list[str], **_: object) -> dict[str, object]:
        mask = [[1] * lengths[t] + [0] * (4 - lengths[t]) for t in texts]
        return {"attention_mask": torch.tensor(mask)}

    def model(attention_mask: object) -> object:
        place = torch.arange(4.0)[None, :, None].expand(len(attention_mask), 4, 3)  # type: ignore[arg-type]
        return SimpleNamespace(last_hidden_state=place)

    vectors = encode_clip(["highway=path", "a=b=c"], tokenizer, model)
    assert vectors.tolist() == [[2, 2, 2], [1, 1, 1]]
