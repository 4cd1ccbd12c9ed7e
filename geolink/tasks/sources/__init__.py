"""Labelled images: what lies at a place, and who reads it. `open_data` picks by what lies there.

One module a layout. Files are read through a `ReadPixels` that is handed in, so that formats which
need rasterio stay out of this layer. May import `schemas` and the rest of `geolink` but `cli`.
"""
