"""Pretraining: `pretrain` is the loop, one screen, top to bottom (`loop.py`).

`augment.py` (image and graph by the same parameters), `optim.py` (AdamW, schedule), `log.py`
(`log.jsonl`, TensorBoard), `run.py` (the run's folder: what it holds, where to go on). May import
`schemas` and the rest of `geolink` but `cli` and `tasks`.
"""
