"""What an encoder is good for: one module a task (`knn.py`).

`features.py` (frozen encoder and baselines) and `scores.py` (scores, bootstrap intervals) are
shared. May import `schemas` and the rest of `geolink` but `cli`.
"""
