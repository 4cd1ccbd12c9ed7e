"""What ties data engineering and training together: Prefect flows and the offline demo.

Thin: each task calls one function of `pipelines` or `geolink`. May import everything.
"""
