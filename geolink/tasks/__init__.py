"""What an encoder is good for.

`evaluate.py` is one evaluation from data to files, the same for all tasks; `contracts.py` says what
data, encoders and tasks are to one another; `registry.py` has the tasks, one module each (`knn.py`,
`linear.py`, `finetune.py`, ...); `sources/` reads labelled images. Nothing is fitted or chosen on
data whose test split can be read. May import `schemas` and the rest of `geolink` but `cli`.
"""
