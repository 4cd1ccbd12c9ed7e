"""The ledger of findings is complete, and its bits stay where they are."""

import ast
from pathlib import Path

import numpy as np
import pytest

from schemas.findings import CHIP_FLAGS, FINDINGS, flagged, set_flags

ROOT = Path(__file__).resolve().parents[2]
COUNTERS = {"counts", "skipped"}


def counted_codes(source: str) -> set[str]:
    """Codes a module counts: keys of its counters, reasons of its problems."""
    found: set[str] = set()

    def take(node: ast.expr | None) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)

    def name(node: ast.expr) -> str:
        return getattr(node, "id", getattr(node, "attr", ""))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and name(node.value) in COUNTERS:
            take(node.slice)
        elif isinstance(node, ast.Call):
            if name(node.func) in {"Problem", "_Broken"} and node.args:
                take(node.args[0])
            if name(node.func) == "append" and name(getattr(node.func, "value", node)) == "codes":
                take(node.args[0])
            if name(node.func) == "Counter":
                found.update(k.arg for k in node.keywords if k.arg)
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        value = getattr(node, "value", None)
        if isinstance(node, ast.AnnAssign):
            target = node.target
        if isinstance(node, ast.keyword):
            target = ast.Name(node.arg or "")
        for part in ast.walk(value) if value is not None and target is not None else ():
            if name(target) in COUNTERS and isinstance(part, ast.Dict):
                for key in part.keys:
                    take(key)
    return found


def test_every_code_that_the_pipelines_count_is_in_the_ledger() -> None:
    codes = {
        code: path.name
        for path in sorted((ROOT / "pipelines").rglob("*.py"))
        for code in counted_codes(path.read_text(encoding="utf-8"))
    }
    assert {
        "scene_no_crs", "pair_bad_bounds", "osm_filtered", "touch_only", "scene_footprint_wrong",
        "shard_map_unrelated",
    } <= codes.keys()  # fmt: skip
    unknown = {code: file for code, file in codes.items() if code not in FINDINGS}
    assert not unknown, f"enter these in schemas/findings.py: {unknown}"


def test_every_finding_says_what_it_means_and_what_to_do_in_a_sentence() -> None:
    for finding in FINDINGS.values():
        for text in (finding.meaning, finding.remedy):
            assert text[0].isupper(), finding.code
            assert text.endswith("."), finding.code
            assert "|" not in text, finding.code


def test_bits_of_chips_stay_where_they_are() -> None:
    # Published shards hold them: append, never move.
    assert CHIP_FLAGS[:9] == (
        "chip_shifted", "chip_cloudy", "chip_nodata", "chip_seam", "chip_constant",
        "chip_osm_dense", "chip_osm_sparse", "chip_osm_empty", "chip_class_disagrees",
    )  # fmt: skip
    assert len(CHIP_FLAGS) <= 32
    assert all(FINDINGS[code].scope == "chip" for code in CHIP_FLAGS)


def test_flags_are_found_again() -> None:
    first, last = np.array([True, False, True]), np.array([True, True, False])
    finding = set_flags({CHIP_FLAGS[0]: first, CHIP_FLAGS[-1]: last}, 3)
    assert finding.dtype == np.uint32
    np.testing.assert_array_equal(flagged(finding, CHIP_FLAGS[:1]), first)
    np.testing.assert_array_equal(flagged(finding, CHIP_FLAGS[-1:]), last)
    np.testing.assert_array_equal(flagged(finding, CHIP_FLAGS[1:3]), [False] * 3)
    np.testing.assert_array_equal(flagged(finding, ()), [False] * 3)
    with pytest.raises(ValueError, match="not in tuple"):
        flagged(finding, ["no_such_code"])
