"""Pretraining: `pretrain` is the loop, one screen, top to bottom (`loop.py`).

`augment.py` (image and graph by the same parameters), `optim.py` (AdamW, schedule), `log.py`
(`log.jsonl`, TensorBoard), `run.py` (the run's folder: what it holds, where to go on), `writer.py`
(checkpoints, beside the steps), `look.py` (kNN and pictures on the way), `replay.py` (a step that
was not finite, again). May import `schemas` and the rest of `geolink` but `cli`.
"""
