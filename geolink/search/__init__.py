"""Search for places by tag or by example, in the space where images and OSM objects are aligned.

`index` projects every chip of a dataset once, `query` says what is looked for, `rank` finds it and
says how well, against chips whose objects the query has not seen, `sheet` shows it. Exact: one
matrix product in blocks. Uses `geolink.reader`, `geolink.stream`, `geolink.tasks`.
"""
