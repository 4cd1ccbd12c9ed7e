"""Why a shard is as it is, and why it would be built anew: what its content key was made from."""

from collections.abc import Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two `made_from` of a shard, each as a sentence's part; empty: nothing.

    In order of their weight: contract, stages of the code, scenes, OSM, the rest.
    """
    reasons = [f"the dataset's {name} changed" for name in _changed(old, new, "contract")]
    for stage in _changed(old, new, "stages"):
        a, b = old["stages"].get(stage, "none"), new["stages"].get(stage, "none")
        reasons.append(f"stage {stage} is of version {b} instead of {a}")
    inputs = _changed(old, new, "inputs")
    if "scenes" in inputs:
        reasons += _scenes(old["inputs"].get("scenes", []), new["inputs"].get("scenes", []))
    if "osm" in inputs:
        reasons.append("OSM objects in or near it changed")
    if "chips" in inputs:
        reasons.append("other chips of it belong to the region")
    known = ("scenes", "osm", "chips")
    reasons += [f"{name.replace('_', ' ')} changed" for name in inputs if name not in known]
    return reasons


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], part: str) -> list[str]:
    a, b = old.get(part, {}), new.get(part, {})
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def _scenes(old: list[str], new: list[str]) -> list[str]:
    """Scenes by id; the rest of an entry is the digest of its pixels."""
    before, after = (dict(s.rsplit(" ", 1) for s in scenes) for scenes in (old, new))
    reasons = [f"scene {s} is new" for s in sorted(after.keys() - before.keys())]
    reasons += [f"scene {s} is gone" for s in sorted(before.keys() - after.keys())]
    common = before.keys() & after.keys()
    reasons += [f"scene {s} changed" for s in sorted(common) if before[s] != after[s]]
    return reasons or ["its scenes are in another order"]
