"""Several OSM extracts become one, element by element, so that what spans their border is whole.

Each element (node, way, relation) is written once: in its highest version, and of one version from
the newest extract. Nothing is held in memory but one element of each extract.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import osmium

from schemas.errors import GeoLinkError

_TYPES = {"n": 0, "w": 1, "r": 2}

_Key = tuple[int, bool, int]


def merge_pbfs(pbfs: Sequence[Path], target: Path) -> dict[str, int]:
    """Merge extracts, the newest first, into a PBF file; what they share is counted.

    `osm_extracts_overlap`: tagged elements that are in more than one of them;
    `osm_extracts_differ`: elements of which they hold different versions.

    Raises GeoLinkError if an extract is not sorted by type and id, as all published ones are.
    """
    counts: Counter[str] = Counter()
    streams = [_elements(pbf) for pbf in pbfs]
    heads = [next(stream, None) for stream in streams]
    with osmium.SimpleWriter(str(target), overwrite=True) as writer:
        while keys := [head[0] for head in heads if head]:
            least = min(keys)
            same = [i for i, head in enumerate(heads) if head and head[0] == least]
            elements = [head[1] for i in same if (head := heads[i])]
            best = elements[0]
            if len(same) > 1:
                versions = [e.version for e in elements]
                best = elements[versions.index(max(versions))]
                counts["osm_extracts_overlap"] += len(best.tags) > 0
                counts["osm_extracts_differ"] += min(versions) != max(versions)
            writer.add(best)
            for i in same:
                heads[i] = next(streams[i], None)
    return {code: n for code, n in counts.items() if n}


def _elements(pbf: Path) -> Iterator[tuple[_Key, Any]]:
    """Elements of a file with their place in it: by type, negative ids first, by size of id."""
    last: _Key = (-1, False, 0)
    for element in osmium.FileProcessor(str(pbf)):
        key = (_TYPES[element.type_str()], element.id > 0, abs(element.id))
        if key <= last:
            raise GeoLinkError(
                f"OSM extract {pbf} is not sorted by type and id, so it cannot be merged with "
                f"others; sort it first: `osmium sort {pbf.name} -o sorted.osm.pbf`"
            )
        last = key
        yield key, element
