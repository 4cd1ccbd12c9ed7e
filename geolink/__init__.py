"""The library a training or inference job imports: reader, models, losses, training, tasks.

May import `schemas`; never imports `pipelines` or `flows`, nor dask, duckdb, rasterio or
prefect. Only `geolink.cli`, the face on top, reaches into all of them, lazily.
"""

import os

# OpenMP threads wait for one another by spinning. As long as they like, by default, which slows a
# shared machine down many times over; a little, and an idle machine loses nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
