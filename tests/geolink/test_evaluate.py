"""Whole evaluations: what they say is so, what leaks is refused, what is learnt helps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from geolink.checkpoint import load_model
from geolink.cli import main
from geolink.cli.evaluate import BASELINES, INPUTS, make_config
from geolink.device import normalise
from geolink.reader import open_dataset, read_shard
from geolink.tasks import evaluate as evaluation
from geolink.tasks.contracts import Fit, Fitted, Leak
from geolink.tasks.evaluate import evaluate, evaluate_seeds
from geolink.tasks.knn import fit_knn
from geolink.tasks.registry import TASKS
from geolink.tasks.report import PREDICTIONS, RESULT, TEXT
from geolink.tasks.train import parameter_groups
from schemas.errors import GeoLinkError
from schemas.evaluation import Baseline, Inputs, TaskConfig, TaskName, TrainingOptions
from tests.shards import make_dataset
from tests.tasks import make_checkpoint, make_npz, stripes


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A dataset with three splits, and checkpoints of two seeds."""
    root = tmp_path_factory.mktemp("evaluate")
    folder = make_dataset(root / "d", shards=6, chips=8, splits=("train", "val", "test"))
    return folder, [make_checkpoint(root / f"run-{seed}", seed) for seed in (0, 1)]


def config(places: tuple[Path, list[Path]], **changes: Any) -> TaskConfig:
    return TaskConfig(
        **{
            "checkpoint": places[1][0], "data": places[0], "knn": {"k": 3}, "bootstrap": 20,
            **changes,
        }
    )  # fmt: skip


def test_a_checkpoint_is_scored_on_held_out_chips(
    places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """The encoder's score against scikit-learn on features and labels made by hand."""
    out = tmp_path / "new" / "knn"
    result = evaluate(config(places, held_out=("val", "test"), output=out))
    assert json.loads((out / RESULT).read_text()) == result
    assert list(result["scores"]) == ["encoder", "random", "pixels", "bands", "majority"]

    dataset = open_dataset(places[0])
    model, meta = load_model(places[1][0])
    x: dict[bool, list[NDArray[np.float32]]] = {True: [], False: []}
    y: dict[bool, list[NDArray[np.int64]]] = {True: [], False: []}
    for row in dataset.rows:
        shard = read_shard(dataset, row)
        pixels, scale = torch.from_numpy(shard["image"]), meta.band_scale(torch.device("cpu"))
        images = normalise(pixels, *scale, meta.nodata)
        with torch.no_grad():
            x[row.split == "train"].append(model.encode_image(images)[:, 1:].mean(1).numpy())
        y[row.split == "train"].append(shard["label_region"].argmax(1))
    scaler = StandardScaler().fit(np.concatenate(x[True]))
    fit, held_out = (scaler.transform(np.concatenate(x[of_train])) for of_train in (True, False))
    known, truth = np.concatenate(y[True]), np.concatenate(y[False])
    oracle = KNeighborsClassifier(3, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    predicted = oracle.fit(fit, known).predict(held_out)
    there = np.isin(truth, known)
    found = result["scores"]["encoder"]
    assert result["held_out"] == there.sum()
    assert result["left_out"]["test"] == {"class_not_in_train": int((~there).sum())}
    one = 1 / there.sum()
    assert found["score"]["accuracy"] == pytest.approx(
        accuracy_score(truth[there], predicted[there]), abs=one
    )
    assert found["score"]["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(truth[there], predicted[there]), abs=one
    )
    low, high = found["interval"]["accuracy"]
    assert low <= found["score"]["accuracy"] <= high
    assert "difference" in result["scores"]["pixels"]
    assert "difference" not in found
    assert np.array(found["confusion"]).sum() == there.sum()

    kept = np.load(out / PREDICTIONS)
    assert kept["truth"].shape == (there.sum(),)
    hits = kept["encoder/1/0"].argmax(1) == kept["truth"]
    assert hits.mean() == pytest.approx(found["score"]["accuracy"])
    assert "| encoder |" in (out / TEXT).read_text()
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 8
    assert "http" not in page.replace("http-equiv", "")


def test_hyper_parameters_are_never_chosen_on_test(
    places: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that looks at the test split while it is fitted."""

    def cheat(fit: Fit) -> Fitted:
        best = max(
            (1, 3, 5), key=lambda k: float(fit.data.part("test").label[k])  # type: ignore[index]
        )  # fmt: skip
        return fit_knn(replace(fit, config=config(places, knn={"k": best})))

    def cheat_by_features(fit: Fit) -> Fitted:
        fit.features.features(fit.encoder, fit.data, "test")
        return fit_knn(fit)

    for fit in (cheat, cheat_by_features):
        monkeypatch.setitem(TASKS, "knn", replace(TASKS["knn"], fit=fit))
        with pytest.raises(Leak, match=r"split test .* is not to be seen while a model is fitted"):
            evaluate(config(places))


def test_a_planted_overlap_of_validation_and_test_is_refused(
    places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    image, _ = stripes(90, 0)
    split = np.array(["train"] * 60 + ["val"] * 15 + ["test"] * 15)
    image[85] = image[65]
    data = make_npz(tmp_path / "d.npz", image=image, split=split)
    with pytest.raises(Leak, match="1 images of d have the same pixels in both val and test"):
        evaluate(config(places, task="linear", data=data))


def test_the_same_evaluation_gives_the_same_result(
    places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    data = make_npz(tmp_path / "d.npz")
    options = {"training": {"epochs": 2, "batch_size": 16}, "linear": {"penalties": [0.01]}}
    for task, baselines in (("linear", ("random",)), ("finetune", ())):
        changes = {"task": task, "data": data, "baselines": baselines, **options}
        each = [evaluate(config(places, **changes)) for _ in range(2)]
        assert each[0] == each[1]


def test_few_labels_and_seeds_make_a_curve(places: tuple[Path, list[Path]], tmp_path: Path) -> None:
    data = make_npz(tmp_path / "d.npz", count=150)
    result = evaluate(
        config(places, task="linear", data=data, shares=(0.1, 1.0), seeds=3,
               linear={"penalties": (1e-3, 1e-2, 1e-1), "steps": 50},
               baselines=("bands", "majority"))
    )  # fmt: skip
    points = result["curve"]["bands"]
    assert [p["labels"] for p in points] == [9, 90]
    assert points[1]["std_over_seeds"]["accuracy"] == 0
    of = [r for r in result["runs"] if r["method"] == "bands" and r["share"] == 0.1]
    values = [r["score"]["accuracy"] for r in of]
    assert len({r["seed"] for r in of}) == 3
    assert points[0]["score"]["accuracy"] == pytest.approx(np.mean(values))
    assert points[0]["std_over_seeds"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert all(len(r["trials"]) == 3 for r in of)
    best = max(of[0]["trials"], key=lambda t: (t["score"], t["penalty"]))
    assert of[0]["chosen"]["penalty"] == best["penalty"]


@pytest.mark.parametrize("kind", ["class", "multilabel"])
def test_fine_tuning_learns_what_the_majority_does_not_know(
    kind: str, places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    image, label = stripes(150, 0)
    many = np.stack([label == 0, label != 1], 1).astype(np.uint8)
    given = {"label": label} if kind == "class" else {"label": many, "classes": ["a", "b"]}
    data = make_npz(tmp_path / "d.npz", image=image, **given)
    options = {"epochs": 12, "batch_size": 16, "lr": [3e-3], "patience": 12, "layer_decay": 1.0}
    result = evaluate(
        config(places, task="finetune", data=data, training=options, baselines=("majority",),
               output=tmp_path / "out", bootstrap=200)
    )  # fmt: skip
    measure = result["measures"][0]
    value, low, _ = result["scores"]["majority"]["difference"][measure]
    assert value > 0.2
    assert low > 0
    run = result["runs"][0]
    best = max(run["curve"], key=lambda c: (c["score"], -c["epoch"]))
    assert run["chosen"]["epoch"] == best["epoch"]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_rates_fall_from_block_to_block() -> None:
    from geolink.models.build import make_model
    from geolink.tasks.encoders import _ours
    from tests.tasks import TINY

    encoder = _ours(make_model(TINY), "image", lambda images: images, "x", {})
    head = torch.nn.Linear(4, 2)
    groups = parameter_groups(encoder, head, TrainingOptions(layer_decay=0.5))
    factors = {id(p): g["rate_factor"] for g in groups for p in g["params"]}
    assert factors[id(head.weight)] == 1.0
    model = encoder.module
    assert model is not None
    blocks = model.img_encoder.blocks  # type: ignore[union-attr]
    found = [factors[id(b.attn.qkv.weight)] for b in blocks]  # type: ignore[union-attr]
    assert found == [0.25, 0.5]
    frozen = parameter_groups(encoder, head, TrainingOptions(freeze=True))
    assert sum(len(g["params"]) for g in frozen) == 2


def test_osm_helps_where_the_label_is_of_osm(places: tuple[Path, list[Path]]) -> None:
    """All three inputs go through; what the map itself says is left out, being the label."""
    result = evaluate(config(places, inputs="image+osm", task="linear"))
    methods = ["encoder", "image-only", "osm-only", "random", "pixels", "bands", "majority"]
    assert list(result["scores"]) == methods
    assert any("OpenStreetMap itself" in note for note in result["notes"])
    result = evaluate(config(places, baselines=("osm",)))
    assert list(result["scores"]) == ["encoder", "osm"]


def test_seeds_are_summed_up_by_mean_and_spread(places: tuple[Path, list[Path]]) -> None:
    result = evaluate_seeds(config(places), places[1])
    values = [run["scores"]["encoder"]["score"]["accuracy"] for run in result["runs"]]
    spread = result["scores"]["encoder"]["accuracy"]
    assert spread["mean"] == pytest.approx(np.mean(values))
    assert spread["std"] == pytest.approx(np.std(values, ddof=1))
    assert (spread["low"], spread["high"]) == (min(values), max(values))
    with pytest.raises(GeoLinkError, match="no checkpoint to evaluate"):
        evaluate_seeds(config(places), [])


def test_evaluations_that_cannot_be_say_why(
    places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for changes, text in (
        ({"knn": {"k": 17}}, "k is 17, but only 16 images of train"),
        ({"min_share": 1.0}, "no image has a class in split train"),
        ({"data": tmp_path / "nowhere"}, "there are no data .*nowhere"),
        ({"checkpoint": tmp_path / "nothing"}, "does not exist"),
        ({"output": tmp_path / "file" / "x"}, "cannot write"),
        ({"labels": "pixel"}, "task knn needs labels of kind class or multilabel, .* kind mask"),
        ({"task": "linear", "held_out": ("val", "test")}, "chooses on a validation split, and"),
        ({"labels": Path("regoin")}, "cannot read labels regoin: .*labels are region, regions"),
        ({"task": "finetune", "inputs": "image+osm", "training": {"mixup": 0.2}}, "mixup mixes"),
        ({"task": "finetune", "training": {"lr": [1e30], "epochs": 3}}, "not finite any more"),
    ):
        with pytest.raises(GeoLinkError, match=text):
            evaluate(config(places, **changes))
    with pytest.raises(ValueError, match="split train is in fit and in held_out"):
        config(places, held_out=("train",))


def _run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    return int(stopped.value.code or 0)


def test_the_command_line_takes_a_task_or_a_config(
    places: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = places[1][0]
    words = ["evaluate", "knn", "--checkpoint", str(run), "--data", str(places[0])]
    assert _run(*words, "--set", "knn.k=3", "--set", "bootstrap=20", "--baseline", "majority") == 0
    shown = capsys.readouterr().out
    assert "knn on " in shown
    assert "majority" in shown
    assert "pixels" not in shown
    (tmp_path / "e.yaml").write_text(
        f"checkpoint: {run}\ndata: {places[0]}\nknn: {{k: 3}}\nbootstrap: 20\n"
    )
    assert _run("evaluate", str(tmp_path / "e.yaml"), "--baseline", "majority", "--json") == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["bootstrap"] == 20
    for words, text in (
        (["nothing"], "there is no task 'nothing'"),
        (["knn", "--data", "x"], "the command line: key 'checkpoint' is missing"),
        (["knn", "--set", "knn.kk=3", "--data", "x", "--checkpoint", "y"], "did you mean 'k'"),
        (["knn", "--set", "k"], "write KEY=VALUE"),
    ):
        assert _run("evaluate", *words) == 2
        assert text in capsys.readouterr().err


def test_evaluations_are_compared_image_by_image(
    places: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n, run in enumerate((*places[1], places[1][0])):
        held_out = ("val", "test") if n == 2 else ("test",)
        evaluate(
            config(
                places, checkpoint=run, held_out=held_out, baselines=(), output=tmp_path / f"{n}"
            )
        )
    a, b, other = (str(tmp_path / f"{n}") for n in range(3))
    assert _run("compare", a, b, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    scores = [
        json.loads((Path(f) / RESULT).read_text())["scores"]["encoder"]["score"]["accuracy"]
        for f in (a, b)
    ]
    assert [cell.split("%")[0] for cell in table["accuracy"]] == [f"{100 * s:.1f}" for s in scores]
    lead = table["accuracy: lead over the first"]
    assert lead[0] is None
    assert lead[1].startswith(f"{100 * (scores[1] - scores[0]):+.1f} (")
    assert _run("compare", a, other) == 2
    assert "were not scored on the same test images" in capsys.readouterr().err


def test_the_command_line_knows_the_choices_of_the_config() -> None:
    from typing import get_args

    assert set(get_args(TaskName)) == set(TASKS)
    assert set(get_args(Inputs)) == set(INPUTS)
    assert set(get_args(Baseline)) == set(BASELINES)
    made = make_config("knn", {"checkpoint": "timm:x", "data": "d", "shares": (0.1,)}, ())
    assert (made.checkpoint, made.data, made.shares) == ("timm:x", Path("d"), (0.1,))


def test_what_is_fitted_never_sees_test(places: tuple[Path, list[Path]]) -> None:
    data = evaluation.open_data(config(places))
    with pytest.raises(Leak, match="whose test split is not hidden"):
        evaluation._fit(
            "majority", TASKS["knn"], None, data, np.arange(3), config(places), 0,
            torch.device("cpu"), None,  # type: ignore[arg-type]
        )  # fmt: skip
