"""Pages of the docs that are made from the contract itself.

Run `python -m schemas.docs docs` to write them; a test keeps them true.
"""

import sys
from pathlib import Path

from schemas.findings import CHIP_FLAGS, findings_table
from schemas.layout import Kind, Relation, layout_table
from schemas.taxonomy import default_taxonomy

_HEAD = """# The data contract

Made from the code by `python -m schemas.docs docs`; `geolink schema shard` prints the table.

A dataset is a folder:

```
dataset.json                       schema version, name, grid, sensor, taxonomy, tag filter, licence
shards/<shard>/<content-key>.zarr  immutable Zarr v3 groups, one a block of chips
tags/<vocabulary-key>.parquet      every tag of a snapshot: id, key, value, objects
tags/<vocabulary-key>-<encoder>.npy  text embeddings [V, D] float16, rows as in the vocabulary
snapshots/00000001.parquet         one row a shard; a published state that readers pin
catalog.duckdb                     what was considered, built and found, for questions in SQL
```

A shard's content key is a hash of everything it depends on: the same inputs give the same key and
the same bytes, by whatever path a dataset came to be.

## Places

A chip is a square of `size` pixels at `gsd_m` metres in one UTM zone, aligned to easting 0,
northing 0; its zone is that of its centre's longitude (the exceptions for Norway and Svalbard are
not applied). Along a zone border the squares of two zones can overlap or leave slivers narrower
than a chip. Chip-relative positions are in [0, 1], x right, y **down** from the top-left corner.

## Arrays of a shard

N chips, M objects, E edges. Ragged parts are CSR: part n is `offset[n] .. offset[n + 1]`. Chips are
in raster order (north-west first), objects by (chip, kind, OSM id, part), edges by
(chip, source, target, relation). A dimension `*_edge` is one longer than what it delimits.
"""


_FINDINGS = """# Findings

Made from the code by `python -m schemas.docs docs`.

A build stops for nothing that can be left out, counted and reported. Every count has a code. Counts
by shard stand in the snapshot and in the table `findings` of the catalog:

```sql
SELECT severity, code, sum(count) FROM findings
WHERE build = (SELECT max(build) FROM builds) GROUP BY ALL ORDER BY ALL;
SELECT shard, chip FROM chip_findings WHERE code = 'chip_shifted';
```

Severity: *note*, as it should be, but worth knowing; *warning*, look at it; *error*, something is
wrong. Findings of chips are also bits of each chip's `finding`, and stand in the snapshot, so that
a training config can leave such chips out or weigh them:

```yaml
quality:
  drop: [chip_shifted]
  weights: {chip_cloudy: 0.5}
```
"""


def findings_page() -> str:
    """The findings as Markdown."""
    bits = ", ".join(f"{n} `{code}`" for n, code in enumerate(CHIP_FLAGS))
    return "\n".join([_FINDINGS, findings_table(), "", f"Bits of `finding`: {bits}.", ""])


def contract_page() -> str:
    """The data contract as Markdown."""
    taxonomy = default_taxonomy()
    kinds = ", ".join(f"{k.name.lower()} {k.value}" for k in Kind)
    relations = ", ".join(f"{r.name.lower()} {r.value}" for r in Relation)
    classes = ["| id | class | tags |", "|---|---|---|"]
    for n, c in enumerate(taxonomy.classes, start=1):
        classes.append(f"| {n} | {c.name} | {', '.join(f'`{r}`' for r in c.rules)} |")
    return "\n".join(
        [
            _HEAD,
            layout_table(),
            "",
            f"Kinds: {kinds}.",
            "",
            f"Relations of source to target: {relations}. They are exactly DE-9IM on the clipped",
            "geometries; both directions are stored. Disjoint objects have no edge; points have",
            "`near` edges to their Delaunay neighbours as well.",
            "",
            "## Classes",
            "",
            "Drawn in this order, a later class over an earlier one; 0 = no OSM statement.",
            "",
            *classes,
            "",
        ]
    )


PAGES = {"data-contract.md": contract_page, "findings.md": findings_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (Path(sys.argv[1]) / name).write_text(make(), encoding="utf-8")
