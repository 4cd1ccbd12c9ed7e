"""The library a training or inference job imports: reader, models, losses, training, tasks.

May import `schemas`; never imports `pipelines` or `flows`, nor dask, duckdb, rasterio or
prefect. Only `geolink.cli`, the face on top, reaches into all of them, lazily.
"""

import os

# Threads that wait by spinning slow a shared machine down many times over: OpenMP's default.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
