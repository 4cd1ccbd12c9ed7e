"""The library a training or inference job imports: reader, models, losses, training, tasks.

May import `schemas`; never imports `pipelines` or `flows`, nor dask, duckdb, rasterio or
prefect. Only `geolink.cli`, the face on top, reaches into all of them, lazily.
"""
