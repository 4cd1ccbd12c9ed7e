"""Chips of a dataset in other formats: GeoTIFF, PNG, GeoParquet, STAC.

Each writer takes some chips of one shard (`schemas.chips.ShardPart`) and a folder, and writes the
same bytes for the same chips, each file at once. May import `schemas` and `pipelines`; what walks
over a dataset is `flows.export`.
"""
