"""The shard layout: what is valid passes, and every planted fault is named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from schemas.errors import GeoLinkError
from schemas.layout import ARRAYS, LAYOUT, Kind, Relation, dimensions, layout_table, validate

Arrays = dict[str, NDArray[Any]]
N, M, E, T, U, P, CLASSES = 2, 5, 7, 4, 3, 6, 20
TEXT = b"building=yeshighway=pathname=A"


def _shard() -> Arrays:
    """Two chips with three and two objects, by hand."""
    sizes = {
        "chip": N, "band": 3, "y": 32, "x": 32, "patch_y": 4, "patch_x": 4, "class": CLASSES,
        "object": M, "edge": E, "object_tag": T, "tag": U, "byte": len(TEXT), "correspondence": P,
        "chip_edge": N + 1, "object_edge": M + 1, "tag_edge": U + 1,
        "word": 2, "bound": 4, "lonlat": 2, "anchor": 4, "xy": 2, "ends": 2, "offset": 3,
    }  # fmt: skip
    arrays: Arrays = {
        spec.name: np.full(
            [sizes[d] for d in spec.dims],
            spec.fill,
            "uint8" if spec.dtype == "image" else spec.dtype,
        )
        for spec in LAYOUT
    }
    arrays["object_offset"][:] = [0, 3, 5]
    arrays["object_kind"][:] = [0, 1, 2, 1, 2]
    arrays["object_tag_offset"][:] = [0, 1, 1, 2, 3, 4]
    arrays["object_tag"][:] = [0, 2, 1, 1]
    arrays["tag"][:] = [5, 17, 2**63]
    arrays["tag_text_offset"][:] = [0, 12, 24, 30]
    arrays["edge_offset"][:] = [0, 5, 7]
    arrays["edge"][:] = [[0, 0], [0, 2], [1, 1], [2, 0], [2, 2], [0, 0], [1, 1]]
    arrays["relation"][:] = [0, 8, 0, 7, 0, 0, 0]
    arrays["patch_offset"][:] = [0, 1, 2, 4, 5, 6]
    arrays["patch"][:] = [0, 15, 3, 4, 9, 10]
    return arrays


def test_a_valid_shard_passes_and_has_its_sizes() -> None:
    sizes = validate(_shard())
    assert {sizes[d] for d in ("chip", "object", "edge")} == {N, M, E}
    assert (sizes["tag"], sizes["correspondence"], sizes["class"]) == (U, P, CLASSES)
    assert sizes == dimensions(_shard())


def test_a_shard_may_have_no_object_and_no_chip() -> None:
    arrays = _shard()
    empty = ("object", "edge", "object_tag", "tag", "byte", "correspondence")
    for spec in LAYOUT:
        if spec.dims[0] in empty:
            arrays[spec.name] = arrays[spec.name][:0]
        if spec.dims[0] in ("object_edge", "tag_edge"):
            arrays[spec.name] = np.zeros(1, np.int64)
        if spec.dims[0] == "chip_edge":
            arrays[spec.name] = np.zeros(N + 1, np.int64)
    assert validate(arrays)["object"] == 0
    for spec in LAYOUT:
        if spec.dims[0] in ("chip", "chip_edge"):
            arrays[spec.name] = arrays[spec.name][: 1 if spec.dims[0] == "chip_edge" else 0]
    assert validate(arrays)["chip"] == 0


@pytest.mark.parametrize("name", list(ARRAYS))
def test_an_array_that_is_missing_is_named(name: str) -> None:
    arrays = _shard()
    del arrays[name]
    with pytest.raises(GeoLinkError, match=f"'{name}' is missing"):
        validate(arrays)


@pytest.mark.parametrize("name", list(ARRAYS))
def test_an_array_of_another_type_is_named(name: str) -> None:
    arrays = _shard()
    arrays[name] = arrays[name].astype(np.complex64)
    with pytest.raises(GeoLinkError, match=f"'{name}' is complex64, not"):
        validate(arrays)


@pytest.mark.parametrize("name", list(ARRAYS))
def test_an_array_of_another_rank_is_named(name: str) -> None:
    arrays = _shard()
    arrays[name] = arrays[name][..., None]
    with pytest.raises(GeoLinkError, match=f"'{name}' has .* dimensions, not"):
        validate(arrays)


@pytest.mark.parametrize("name", [s.name for s in LAYOUT if s.name not in ("image", "tag")])
def test_an_array_that_is_too_long_is_an_error(name: str) -> None:
    arrays = _shard()
    arrays[name] = np.concatenate([arrays[name], arrays[name][-1:]])
    with pytest.raises(GeoLinkError, match="shard array"):
        validate(arrays)


def test_an_array_that_does_not_belong_is_named() -> None:
    with pytest.raises(GeoLinkError, match="'colour' is no array of the shard layout"):
        validate({**_shard(), "colour": np.zeros(3)})


@pytest.mark.parametrize(
    "name",
    ["object_offset", "edge_offset", "object_tag_offset", "tag_text_offset", "patch_offset"],
)
@pytest.mark.parametrize("at", ["start", "end", "middle"])
def test_an_offset_that_does_not_rise_from_zero_to_the_end_is_named(name: str, at: str) -> None:
    arrays = _shard()
    offset = arrays[name]
    if at == "start":
        offset[0] = 1
    elif at == "end":
        offset[-1] -= 1
    else:
        offset[1] = offset[-1] + 1
    with pytest.raises(GeoLinkError, match=f"'{name}' is no rising offset"):
        validate(arrays)


def _set(name: str, place: Any, value: float) -> Callable[[Arrays], None]:
    def plant(arrays: Arrays) -> None:
        arrays[name][place] = value

    return plant


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("edge", _set("edge", (1, 1), 3)),
        ("edge", _set("edge", (6, 0), 2)),
        ("edge", _set("edge", (0, 0), -1)),
        ("object_kind", _set("object_kind", 0, len(Kind))),
        ("object_class", _set("object_class", 0, CLASSES + 1)),
        ("label_pixel", _set("label_pixel", (1, 31, 31), CLASSES + 1)),
        ("relation", _set("relation", 0, len(Relation))),
        ("object_tag", _set("object_tag", 0, U)),
        ("object_tag", _set("object_tag", 0, -1)),
        ("patch", _set("patch", 5, 16)),
    ],
)
def test_an_index_out_of_range_is_named(name: str, plant: Callable[[Arrays], None]) -> None:
    arrays = _shard()
    plant(arrays)
    with pytest.raises(GeoLinkError, match=f"'{name}' holds an index out of range"):
        validate(arrays)


@pytest.mark.parametrize("tags", [[17, 5, 18], [5, 5, 6]])
def test_tags_must_be_sorted_and_distinct(tags: list[int]) -> None:
    arrays = _shard()
    arrays["tag"] = np.array(tags, np.uint64)
    with pytest.raises(GeoLinkError, match="'tag' is not sorted or has a duplicate"):
        validate(arrays)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan])
def test_an_anchor_outside_its_chip_is_an_error(value: float) -> None:
    arrays = _shard()
    arrays["object_anchor"][4, 3, 1] = value
    with pytest.raises(GeoLinkError, match=r"'object_anchor' leaves \[0, 1\]"):
        validate(arrays)


def test_the_table_names_every_array_once() -> None:
    rows = layout_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [spec.name for spec in LAYOUT]
    assert len(ARRAYS) == len(LAYOUT)


def test_codes_are_those_of_the_data_contract() -> None:
    assert [kind.name for kind in Kind] == ["POINT", "LINE", "POLYGON"]
    assert [relation.name.lower() for relation in Relation] == [
        "self", "touches", "overlaps", "covers", "covered_by", "equals", "crosses",
        "contains_point", "within", "near",
    ]  # fmt: skip
