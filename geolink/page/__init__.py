"""HTML pages: one look (`house.css`), templates and text of others (`base.py`), curves
(`charts.py`), and the page of a run (`run.py`).

Self-contained: pictures within, nothing fetched. May import `schemas` and the rest of `geolink` but
`cli`; `base.py` and `charts.py` import nothing that only training needs. `flows` builds on them.
"""
