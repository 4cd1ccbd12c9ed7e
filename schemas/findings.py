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
            "Use a collection whose items state a processing baseline, or their bands' offset."),
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
            "Nothing need be done: the scene of the newest processing was kept. If there are many, "
            "name only one of the collections."),
    Finding("scene_place_wrong", "error", "scene",
            "A scene's outline, its stated pixel grid and its files are not at one place: wrong "
            "CRS, or axes exchanged. It was left out.",
            "Report the item to its catalog, or give the raster its right CRS."),
    Finding("scene_datum_changed", "note", "scene",
            "A scene is on another datum than WGS 84 and was moved by PROJ's default "
            "transformation; the shard's record of scenes states its accuracy.",
            "Compare the stated accuracy with the pixel size; where a shift remains, chip_shifted "
            "tells."),
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
            "A chip stands nearer to another split than the buffer, or overlaps one of its chips "
            "at a border of UTM zones, and was left out.",
            "Nothing need be done: it keeps the splits apart. If too many are lost, lower "
            "splits.buffer_m."),
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
            "Nothing need be done: the config asks for it. Set registration to keep or correct if "
            "too many are lost."),
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
            "Look at the map there: it may be a mass import. Cap objects with max_per_chip if they "
            "burden training."),
    Finding("chip_osm_sparse", "note", "chip",
            "The chip has far fewer OSM objects than its shard's other chips.",
            "Look at the image: where it shows more than the map has, drop such chips when "
            "training."),
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
            "Nothing need be done for a few; if there are many, check the extract's coordinates."),
    Finding("invalid_repaired", "note", "object",
            "An invalid geometry was repaired.",
            "Nothing need be done; the repaired shape is used. To get rid of it, mend it in OSM."),
    Finding("repair_piece_dropped", "note", "object",
            "A repaired geometry had pieces of lower dimension, such as spikes, which were left "
            "out.",
            "Nothing need be done; the rest of the shape is used. To get rid of it, mend it in "
            "OSM."),
    Finding("touch_only", "note", "object",
            "A feature only touches a chip from outside and is no object of it.",
            "Nothing need be done: it is an object of the neighbouring chip."),
    Finding("object_sliver", "note", "object",
            "A clipped piece was below a millimetre and was left out.",
            "Nothing need be done: it is noise of the arithmetic."),
    Finding("object_below_minimum", "note", "object",
            "An object was below the minimum size and was left out.",
            "Lower min_polygon_fraction or min_line_fraction to keep it."),
    Finding("object_over_cap", "note", "object",
            "An object was beyond max_per_chip and was left out.",
            "Raise max_per_chip to keep it."),
    # Extracts.
    Finding("osm_way_incomplete", "warning", "extract",
            "A way's nodes are missing from the extract, so it was left out.",
            "Where there are many, take an extract that was cut with complete ways."),
    Finding("osm_relation_incomplete", "warning", "extract",
            "A multipolygon could not be assembled and was left out.",
            "Nothing need be done for a few, which any extract has; if there are many, take an "
            "extract that was cut with complete relations."),
    Finding("osm_relation_without_geometry", "note", "extract",
            "A relation is no area (a route, a site) and was left out.",
            "Nothing need be done: its members are kept by their own tags."),
    Finding("osm_way_without_length", "note", "extract",
            "A way has all its nodes in one place and was left out.",
            "Nothing need be done; it has no shape. To get rid of it, mend it in OSM."),
    Finding("osm_filtered", "note", "extract",
            "A feature had no tag left after the tag filter and was left out.",
            "Take keys out of osm.drop_keys, or add some to osm.keep_keys, to keep it."),
    Finding("osm_spans_antimeridian", "warning", "extract",
            "A feature crosses 180 degrees in one piece and was left out.",
            "Split it there in OSM, as OSM's own rules ask."),
    Finding("osm_way_repaired", "note", "extract",
            "A way's area was invalid, fell into several parts when it was repaired, and is kept.",
            "Nothing need be done; all its parts are used. To get rid of it, mend it in OSM."),
    Finding("osm_tag_cleaned", "note", "extract",
            "A feature's tags held control characters or marks of text direction, which were "
            "removed.",
            "Nothing need be done; the cleaned tags are used. To get rid of it, mend them in OSM."),
    Finding("osm_extracts_overlap", "note", "extract",
            "A tagged element is in more than one extract; it counts once.",
            "Nothing need be done where extracts share a border; else leave one of them out."),
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
            "A pair has no meta.json and was left out.", "Add a meta.json with its bounds."),
    Finding("pair_damaged_meta", "error", "dataset",
            "A pair's meta.json cannot be read, so it was left out.",
            "Mend or replace the meta.json."),
    Finding("pair_bad_bounds", "error", "dataset",
            "A pair's bounds are no box of degrees, so it was left out.",
            "Give west, south, east, north in degrees in its meta.json."),
    Finding("pair_outside_utm", "warning", "dataset",
            "A pair lies beyond the UTM zones and was left out.",
            "Nothing need be done: chips are only defined between 80°S and 84°N."),
    Finding("pair_without_image", "warning", "dataset",
            "A pair has no image and was left out.", "Add its image."),
    Finding("pair_with_several_images", "warning", "dataset",
            "A pair has more than one image and was left out.", "Keep one image in its folder."),
    Finding("pair_damaged_image", "error", "dataset",
            "A pair's image cannot be read, so it was left out.", "Replace its image."),
    Finding("pair_with_several_vectors", "warning", "dataset",
            "A pair has more than one vector file of a kind and was left out.",
            "Keep one vector file for points, one for lines and one for polygons."),
    Finding("pair_damaged_vectors", "error", "dataset",
            "A pair's vectors cannot be read, so it was left out.",
            "Replace its vector file; it must be GeoJSON."),
    Finding("feature_filtered", "note", "object",
            "A feature of a pair had no tag left after the tag filter and was left out.",
            "Nothing need be done: names, addresses and editors' notes tell nothing of an image."),
    Finding("feature_damaged", "warning", "object",
            "A feature of a pair has coordinates that are no numbers, so it was left out.",
            "Mend the pair's vectors."),
    # Regions.
    Finding("shard_without_osm", "note", "shard",
            "No OSM feature meets the shard: open sea, or a place outside the extract.",
            "Where it is land, use an extract that covers it."),
    Finding("point_without_chip", "warning", "dataset",
            "A point of the region has no centre of a chip within radius_m, so nothing was built "
            "for it.",
            "Raise region.radius_m: from 0.75 of a chip's side on, nearly every point has one."),
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
