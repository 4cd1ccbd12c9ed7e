"""What can be wrong or odd in a dataset: every code that a build counts, and what to do about it.

A finding never stops a build. Counts by code stand in the snapshot (`qc`) and the catalog; codes of
chips are also bits of the shard array `finding`, so that a reader can filter and weigh by them.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Severity = Literal["note", "warning", "error"]
Scope = Literal["chip", "object", "scene", "extract", "shard", "dataset"]


class Finding(NamedTuple):
    """One kind of finding."""

    code: str
    severity: Severity
    """note: as it should be, worth knowing; warning: look at it; error: something is wrong."""
    scope: Scope
    """What is counted."""
    meaning: str
    remedy: str


_ALL = (
    # Scenes.
    Finding("scene_asset_missing", "warning", "scene",
            "A scene lacks the file of a band that the sensor needs.",
            "Check the sensor's band names against the item's assets."),
    Finding("scene_no_crs", "error", "scene",
            "A scene states no coordinate system with an EPSG code.",
            "Give the raster its CRS, for instance with gdal_edit."),
    Finding("scene_offset_unknown", "error", "scene",
            "Nothing tells whether a scene's radiometric offset is applied, so it was left out.",
            "Use a collection whose items state it."),
    Finding("scene_outside_time", "note", "scene",
            "A scene lies outside the time window, or has no time.",
            "Widen start and end if too few scenes are left."),
    Finding("scene_too_cloudy", "note", "scene",
            "A scene's cloud cover exceeds max_cloud.",
            "Raise max_cloud or widen the time window if too few scenes are left."),
    Finding("scene_low_sun", "note", "scene",
            "A scene's sun stands lower than min_sun_elevation.",
            "Lower min_sun_elevation if too few scenes are left."),
    Finding("scene_duplicate", "warning", "scene",
            "A scene is the same acquisition as another one under a second id, so it was left out.",
            "Name one collection only; the scene of the newest processing was kept."),
    Finding("scene_place_wrong", "error", "scene",
            "A scene's outline, its stated pixel grid and its files are not at one place: wrong "
            "CRS, or axes exchanged. It was left out.",
            "Report the item to its catalog, or give the raster its right CRS."),
    Finding("scene_datum_changed", "note", "scene",
            "A scene is on another datum than WGS 84 and was moved by PROJ's default "
            "transformation; the shard's record of scenes states its accuracy.",
            "Look at the accuracy: what remains of a shift shows as chip_shifted."),
    Finding("scene_no_offset", "error", "scene",
            "A scene's dark pixels lie near +1000, though its metadata says that there is no such "
            "offset: it seems not to be taken off.",
            "Leave the scene out, or report the item to its catalog."),
    Finding("scene_double_offset", "error", "scene",
            "A scene's dark pixels lie near 0, though its metadata says that they carry +1000: the "
            "offset seems to be taken off already, so that it was taken off twice.",
            "Leave the scene out, or report the item to its catalog."),
    Finding("scene_too_cloudy_here", "note", "scene",
            "A scene's mask covers more of the shard than max_block_cloud.",
            "Raise max_block_cloud if too few scenes are left."),
    Finding("scene_covers_too_little", "note", "scene",
            "A scene has data in less of the shard than min_coverage.",
            "Lower min_coverage if too few scenes are left."),
    Finding("scene_unreadable", "error", "scene",
            "A file of a scene cannot be read, so the scene was left out.",
            "Fetch or replace the file and build again."),
    Finding("block_without_scene", "warning", "shard",
            "No scene gave a pixel of the shard.",
            "Widen the time window or the cloud limits, or take the place out of the region."),
    Finding("pixel_out_of_range", "warning", "scene",
            "Pixels did not fit the sensor's storage type and were clipped (counted in pixels).",
            "Check the data type and scale of the sensor's bands."),
    Finding("scene_list_short", "warning", "scene",
            "An API returned fewer items than it stated (counted in items).",
            "Build again; report it to the API if it stays so."),
    Finding("scene_nodata_wrong", "error", "scene",
            "A twentieth or more of a scene's data over the shard has one and the same value in "
            "every band: filled in, though it is not the stated nodata value.",
            "Give the file that value as its nodata value, or leave the scene out."),
    Finding("scene_footprint_wrong", "error", "scene",
            "A scene's item says that it covers the shard, but its files hold no pixel there.",
            "Report the item to its catalog; other scenes were used where there are any."),
    # Chips.
    Finding("chip_below_min_valid", "note", "chip",
            "A chip has too few valid pixels and was left out.",
            "Lower min_valid, or allow more scenes, if too many are lost."),
    Finding("chip_near_other_split", "note", "chip",
            "A chip lies within the buffer around another split and was left out.",
            "None: the buffer keeps the splits apart."),
    Finding("chip_shifted", "warning", "chip",
            "Image and OSM are surely shifted against each other by more than a pixel.",
            "Set registration to correct or drop, or use better registered scenes."),
    Finding("shard_map_unrelated", "error", "shard",
            "The map has many outlines, but the image shows nothing like them, however shifted: "
            "another CRS, swapped axes, or another place.",
            "Check the CRS of the images and the axis order of the vectors."),
    Finding("chip_dropped_shifted", "note", "chip",
            "A chip was left out because its image and OSM are surely shifted (registration: "
            "drop).",
            "None: it is what the config asks for."),
    Finding("chip_cloudy", "note", "chip",
            "More than a tenth of the chip's pixels are masked: cloud, shadow or defect.",
            "Allow more scenes, or drop such chips when training."),
    Finding("chip_nodata", "note", "chip",
            "More than a tenth of the chip's pixels have no data.",
            "Allow more scenes, or drop such chips when training."),
    Finding("chip_seam", "note", "chip",
            "Brightness jumps along the border between two scenes of the composite.",
            "Use scenes of one day or season, or another composite."),
    Finding("chip_constant", "warning", "chip",
            "A large part of the chip has one constant value which is not the nodata value.",
            "Check the nodata value of its scene."),
    Finding("chip_osm_dense", "note", "chip",
            "The chip has far more OSM objects than its shard's other chips.",
            "Look for an import; cap objects with max_per_chip if they burden training."),
    Finding("chip_osm_sparse", "note", "chip",
            "The chip has far fewer OSM objects than its shard's other chips.",
            "Look whether the place is unmapped; drop such chips when training."),
    Finding("chip_osm_empty", "note", "chip",
            "The chip has no OSM object.",
            "Drop such chips when training if the model needs a graph."),
    Finding("chip_class_disagrees", "warning", "chip",
            "A class of the map does not look like that class anywhere else in the shard: water "
            "that is bright in near infrared, or plants that are not.",
            "Compare image and OSM: the map may be out of date, or the scene of another place."),
    # Objects.
    Finding("feature_outside_projection", "warning", "object",
            "A feature has coordinates that its UTM zone cannot hold, so it was left out.",
            "None where few; else check the extract's coordinates."),
    Finding("invalid_repaired", "note", "object",
            "An invalid geometry was repaired.",
            "None: mend it in OSM if it matters."),
    Finding("repair_piece_dropped", "note", "object",
            "A repaired geometry had pieces of lower dimension, such as spikes, which were left "
            "out.",
            "None: mend it in OSM if it matters."),
    Finding("touch_only", "note", "object",
            "A feature only touches a chip from outside and is no object of it.",
            "None: it belongs to the neighbour."),
    Finding("object_sliver", "note", "object",
            "A clipped piece was below a millimetre and was left out.",
            "None."),
    Finding("object_below_minimum", "note", "object",
            "An object was below the minimum size and was left out.",
            "Lower min_polygon_fraction or min_line_fraction to keep it."),
    Finding("object_over_cap", "note", "object",
            "An object was beyond max_per_chip and was left out.",
            "Raise max_per_chip to keep it."),
    # Extracts.
    Finding("osm_way_incomplete", "warning", "extract",
            "A way's nodes are missing from the extract, so it was left out.",
            "Cut extracts with complete ways."),
    Finding("osm_relation_incomplete", "warning", "extract",
            "A multipolygon could not be assembled and was left out.",
            "Cut extracts with complete relations; a few broken ones are normal."),
    Finding("osm_relation_without_geometry", "note", "extract",
            "A relation is no area (a route, a site) and was left out.",
            "None."),
    Finding("osm_way_without_length", "note", "extract",
            "A way has all its nodes in one place and was left out.",
            "None: mend it in OSM if it matters."),
    Finding("osm_filtered", "note", "extract",
            "A feature had no tag left after the tag filter and was left out.",
            "Drop fewer keys to keep it."),
    Finding("osm_spans_antimeridian", "warning", "extract",
            "A feature crosses 180 degrees in one piece and was left out.",
            "Split it in OSM."),
    Finding("osm_way_repaired", "note", "extract",
            "A way's area was invalid, fell into several parts when it was repaired, and is kept.",
            "None: mend it in OSM if it matters."),
    Finding("osm_tag_cleaned", "note", "extract",
            "A feature's tags held control characters or marks of text direction, which were "
            "removed.",
            "None: mend it in OSM if it matters."),
    Finding("osm_extracts_overlap", "note", "extract",
            "A tagged element is in more than one extract; it counts once.",
            "None where extracts share a border; else leave one of them out."),
    Finding("osm_extracts_differ", "warning", "extract",
            "Extracts hold different versions of an element; the newest is used.",
            "Use extracts of the same day: what was deleted between them may still be there."),
    Finding("osm_extract_stale", "warning", "extract",
            "The extract's data is older than max_age_days at the time of the newest scene (or the "
            "end of the time window, where no scene has a time).",
            "Use a newer extract, or scenes of its time."),
    Finding("osm_age_unknown", "warning", "extract",
            "The extract, or every scene, does not tell its time, so max_age_days cannot be "
            "checked.",
            "Use an extract with a timestamp, or give scenes.end."),
    Finding("osm_region_uncovered", "warning", "extract",
            "A part of the region lies in no extract of the provider; over the sea that is normal.",
            "Try `find: any`, or give the extracts yourself."),
    # Imported pairs.
    Finding("pair_without_meta", "warning", "dataset",
            "A pair has no meta.json and was left out.", "Add it."),
    Finding("pair_damaged_meta", "error", "dataset",
            "A pair's meta.json cannot be read, so it was left out.", "Mend it."),
    Finding("pair_bad_bounds", "error", "dataset",
            "A pair's bounds are no box of degrees, so it was left out.", "Mend its meta.json."),
    Finding("pair_outside_utm", "warning", "dataset",
            "A pair lies beyond the UTM zones and was left out.", "None."),
    Finding("pair_without_image", "warning", "dataset",
            "A pair has no image and was left out.", "Add it."),
    Finding("pair_with_several_images", "warning", "dataset",
            "A pair has more than one image and was left out.", "Keep one."),
    Finding("pair_damaged_image", "error", "dataset",
            "A pair's image cannot be read, so it was left out.", "Replace it."),
    Finding("pair_with_several_vectors", "warning", "dataset",
            "A pair has more than one vector file of a kind and was left out.", "Keep one."),
    Finding("pair_damaged_vectors", "error", "dataset",
            "A pair's vectors cannot be read, so it was left out.", "Replace them."),
    Finding("feature_filtered", "note", "object",
            "A feature of a pair had no tag left after the tag filter and was left out.",
            "Drop fewer keys to keep it."),
    Finding("feature_damaged", "warning", "object",
            "A feature of a pair has coordinates that are no numbers, so it was left out.",
            "Mend the pair's vectors."),
    # Regions.
    Finding("shard_without_osm", "note", "shard",
            "No OSM feature meets the shard: open sea, or a place outside the extract.",
            "Where it is land, use an extract that covers it."),
    Finding("sample_short", "note", "chip",
            "The region has fewer chips than sample.chips asks for; all of them are kept.",
            "Enlarge the region or ask for fewer."),
    # Licences.
    Finding("licence_unknown", "warning", "dataset",
            "A source states no licence whose terms are known (`schemas/licences.py`).",
            "Read its terms; where you know them, give `licence` in the config."),
    Finding("licence_incompatible", "error", "dataset",
            "Two sources have terms that contradict each other where they are combined.",
            "Leave one of them out, or do not pass the dataset on before its terms are settled."),
    # Builds.
    Finding("shard_failed", "error", "shard",
            "A shard could not be built; the message says why.",
            "Mend the cause and build again: only failed shards are built."),
)  # fmt: skip

FINDINGS: dict[str, Finding] = {finding.code: finding for finding in _ALL}
"""Every code that any stage counts."""

CHIP_FLAGS: tuple[str, ...] = (
    "chip_shifted", "chip_cloudy", "chip_nodata", "chip_seam", "chip_constant", "chip_osm_dense",
    "chip_osm_sparse", "chip_osm_empty", "chip_class_disagrees",
)  # fmt: skip
"""Codes of kept chips: code n is bit n of `finding`. New ones go to the end, none is removed."""


SURE = 0.95
"""Confidence from which a chip's `shift` is believed."""


def set_flags(flags: Mapping[str, NDArray[np.bool_]], chips: int) -> NDArray[np.uint32]:
    """The array `finding` [chip] of some flags [chip] by code."""
    finding = np.zeros(chips, np.uint32)
    for code, flag in flags.items():
        finding |= flag.astype(np.uint32) << np.uint32(CHIP_FLAGS.index(code))
    return finding


def flagged(finding: NDArray[np.uint32], codes: Iterable[str]) -> NDArray[np.bool_]:
    """[chip]: whether a chip has any of some codes of `CHIP_FLAGS`."""
    mask = np.uint32(sum(1 << CHIP_FLAGS.index(code) for code in set(codes)))
    found: NDArray[np.bool_] = (finding & mask) != 0
    return found


def findings_table() -> str:
    """The findings as a Markdown table."""
    head = ["| code | severity | counted | meaning | what to do |", "|---|---|---|---|---|"]
    rows = [
        f"| `{f.code}` | {f.severity} | {f.scope} | {f.meaning} | {f.remedy} |"
        for f in FINDINGS.values()
    ]
    return "\n".join(head + rows)
