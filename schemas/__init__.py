"""The contracts: what data looks like, and nothing that touches it.

Here live the chip grid, sensors, the OSM class taxonomy, the shard layout, dataset metadata,
the catalog's DDL and every config model. Anything may import from here; this package imports
nothing else of GeoLink.
"""
