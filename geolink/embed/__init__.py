"""Embeddings of whole areas: of a dataset, or of one big image, block by block.

`area` says where pixels come from, `windows` runs an encoder over a block, `store` keeps blocks in
Zarr, `colours` makes maps of what is kept, `run` does all of it and goes on where it was stopped.
Uses `geolink.reader`, `geolink.stream`, `geolink.tasks`; never GDAL: files of images are read, and
maps written, by what is handed in.
"""
