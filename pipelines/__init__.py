"""Data engineering: STAC scenes and OSM extracts become Zarr shards.

Pure functions over arrays and tables; `build.py` shows the five steps of a shard. May import
`schemas`; never imports torch, `geolink` or `flows`.
"""
