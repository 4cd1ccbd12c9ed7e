"""Chips of a dataset as training samples for other loaders: WebDataset, PyTorch Geometric.

Each writer takes some chips of one shard (`schemas.chips.ShardPart`) and a folder, and writes the
same bytes for the same chips. May import `schemas` and `geolink`; what walks over a dataset is
`flows.export`. `encoder.py` and `card.py` write the image encoder of a checkpoint for timm, the
Hugging Face hub, TorchGeo and ONNX.
"""
