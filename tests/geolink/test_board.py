"""Figures for TensorBoard, as TensorBoard reads them."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geolink.training.board import Board


def test_tensorboard_shows_the_steps_of_a_run_that_went_on_once(tmp_path: Path) -> None:
    board = Board(tmp_path / "tensorboard", 1)
    for step in (1, 2, 3):
        board.show(step, {"loss": step / 4, "validation/accuracy": 0.5})
    board.close()
    # It was killed after step 3; its last checkpoint was that of step 1.
    again = Board(tmp_path / "tensorboard", 2)
    for step in (2, 3, 4):
        again.show(step, {"loss": step * 2})
    again.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [
        (1, 0.25), (2, 4.0), (3, 6.0), (4, 8.0),
    ]  # fmt: skip
    assert [e.step for e in read.Scalars("validation/accuracy")] == [1]
