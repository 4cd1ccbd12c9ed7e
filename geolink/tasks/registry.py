"""The tasks, by name."""

from __future__ import annotations

from geolink.tasks.change import fit_change
from geolink.tasks.contracts import Task
from geolink.tasks.finetune import fit_finetune
from geolink.tasks.knn import fit_knn
from geolink.tasks.linear import fit_linear
from geolink.tasks.segmentation import fit_segmentation
from geolink.tasks.zones import fit_villages, fit_zones

_FROZEN = ("random", "pixels", "bands", "osm", "majority")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("knn", "class of an image by its nearest neighbours", ("class", "multilabel"),
             _FROZEN, chooses=False, seeded=False, fit=fit_knn),
        Task("linear", "class of an image by a linear probe on frozen features",
             ("class", "multilabel"), _FROZEN, chooses=True, seeded=False, fit=fit_linear),
        Task("finetune", "class of an image by the encoder, fine-tuned", ("class", "multilabel"),
             ("random", "majority"), chooses=True, seeded=True, fit=fit_finetune),
        Task("segmentation", "class of every pixel by a head on the encoder's maps", ("mask",),
             ("random", "majority"), chooses=True, seeded=True, fit=fit_segmentation),
        Task("change", "what changed between two dates, by one encoder that sees both", ("change",),
             ("random", "difference", "majority"), chooses=True, seeded=True, fit=fit_change),
        Task("zones", "urban function zone of an image, or of its pixels", ("class", "mask"),
             ("random", "majority"), chooses=True, seeded=True, fit=fit_zones),
        Task("villages", "whether an image is of an urban village", ("class",),
             ("random", "majority"), chooses=True, seeded=True, fit=fit_villages),
    )
}  # fmt: skip
