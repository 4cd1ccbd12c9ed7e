"""Training of tasks stops when validation says so, and keeps what was best."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geolink.tasks.contracts import TaskBatch
from geolink.tasks.finetune import mixed
from geolink.tasks.held import Held
from geolink.tasks.train import Given, best_of, shuffled, train, turned
from schemas.evaluation import TrainingOptions


def held(count: int = 20) -> Held:
    """Points in two dimensions as images of one pixel; the label is the sign of the first."""
    x = np.random.default_rng(0).normal(size=(count, 2, 1, 1)).astype(np.float32)
    label = (x[:, 0, 0, 0] > 0).astype(np.int64)
    return Held(np.arange(count), x, label, None, None, None, None)


def fitted(
    scores: list[float], patience: int, epochs: int = 10, lr: float = 0.1
) -> tuple[nn.Linear, list[Tensor], list[float], int]:
    """A layer trained while validation gives these scores; its weights after each epoch."""
    torch.manual_seed(0)
    layer, seen = nn.Linear(2, 2), []

    def loss(batch: TaskBatch) -> Tensor:
        assert batch.label is not None
        target = torch.from_numpy(batch.label)
        return nn.functional.cross_entropy(layer(batch.image.flatten(1)), target)

    def validate() -> float:
        assert not layer.training
        seen.append(layer.weight.detach().clone())
        return scores[len(seen) - 1]

    options = TrainingOptions(epochs=epochs, patience=patience, batch_size=8)
    groups = [{"params": list(layer.parameters()), "rate_factor": 1.0, "weight_decay": 0.0}]
    done = train(layer, groups, held(), loss, validate, options, lr=lr, seed=3)
    return layer, seen, [point["loss"] for point in done.curve], done.epoch


def test_it_stops_when_validation_has_not_become_better_for_so_long() -> None:
    layer, seen, losses, best = fitted([0.1, 0.5, 0.4, 0.5, 0.3, 0.9, 0.9], patience=3)
    assert len(seen) == 5  # the better score of the sixth epoch is never seen
    assert best == 2
    assert torch.equal(layer.weight, seen[1])
    assert losses[-1] < losses[0]


def test_it_goes_on_while_validation_becomes_better() -> None:
    layer, seen, _, best = fitted([n / 10 for n in range(6)], patience=1, epochs=6)
    assert (len(seen), best) == (6, 6)
    assert torch.equal(layer.weight, seen[-1])


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    orders = [
        np.concatenate([batch.rows for batch in shuffled(held(), 8, 1, epoch)])
        for epoch in (1, 2, 1)
    ]
    assert all(sorted(order.tolist()) == list(range(20)) for order in orders)
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])


def test_the_rate_with_the_best_validation_is_kept() -> None:
    from geolink.tasks.train import Trained

    made, lr, trained, trials = best_of(
        (0.1, 0.2, 0.3), lambda rate: (Trained(-abs(rate - 0.2), 1, []), f"of {rate}")
    )
    assert (made, lr, trained.score) == ("of 0.2", 0.2, 0.0)
    assert [t["lr"] for t in trials] == [0.1, 0.2, 0.3]


def test_turned_images_and_masks_stay_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(16 * 36, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(16, 6, 6)
    x = Given(mask[:, None].float(), None, mask[:, None].float() + 1)
    x, placed = turned(x, mask, patches=3, generator=generator)
    assert x.graph is None
    assert x.second is not None
    assert placed is not None
    assert torch.equal(x.images[:, 0], placed.float())
    assert torch.equal(x.second[:, 0], placed.float() + 1)
    found = set()
    for turned_mask, plain in zip(placed.numpy(), mask.numpy(), strict=True):
        each = [
            np.rot90(side, times) for side in (plain, plain[:, ::-1]) for times in range(4)
        ]  # fmt: skip
        (which,) = [n for n, one in enumerate(each) if np.array_equal(one, turned_mask)]
        found.add(which)
    assert len(found) >= 6  # of the eight ways in which a square lies on itself


def test_images_with_masks_that_are_no_squares_are_flipped_but_not_turned() -> None:
    mask = torch.arange(16 * 24, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(16, 4, 6)
    _, placed = turned(
        Given(torch.zeros(16, 1, 8, 8)), mask, patches=2, generator=torch.Generator().manual_seed(0)
    )
    assert placed is not None
    same = [torch.equal(one, plain) for one, plain in zip(placed, mask, strict=True)]
    mirrored = [torch.equal(one, plain.flip(-1)) for one, plain in zip(placed, mask, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 0 < sum(mirrored) < 16


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixed_images_have_as_much_of_a_target_as_of_its_image(alpha: float) -> None:
    target = torch.eye(6)
    images = target[:, :, None, None].repeat(1, 1, 2, 2)
    generator = torch.Generator().manual_seed(1)
    mixture, weights = mixed(images, target, alpha, generator)
    torch.testing.assert_close(mixture[:, :, 0, 0], weights)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


def test_what_was_held_in_a_file_is_gone_with_it(tmp_path: Path) -> None:
    import tempfile

    folder = tempfile.TemporaryDirectory(dir=tmp_path)
    x = held()
    kept = Held(x.rows, x.image, x.label, None, None, None, folder)
    assert list(tmp_path.iterdir())
    del kept, folder
    assert not list(tmp_path.iterdir())
