"""Encoders of tasks take what the model takes, and refuse the rest in a sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from geolink.checkpoint import load_model
from geolink.device import normalise
from geolink.models.ops import grid_sincos
from geolink.reader import open_dataset, tag_table
from geolink.tasks.adapt import at_size, match_bands
from geolink.tasks.baselines import band_features, osm_features, pixel_features
from geolink.tasks.contracts import Imagery, TaskData
from geolink.tasks.encoders import levels_of, open_encoder, own_copy
from geolink.tasks.sources import open_data
from geolink.tasks.store import FeatureStore, encode
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from tests.shards import make_dataset
from tests.tasks import TINY, make_checkpoint, make_npz, stripes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each variant."""
    root = tmp_path_factory.mktemp("runs")
    return {v: make_checkpoint(root / v, variant=v) for v in ("paper", "geolink2")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    folder = tmp_path_factory.mktemp("d") / "d"
    make_dataset(folder, shards=3, chips=8, splits=("train", "val", "test"))
    return open_data(TaskConfig(checkpoint="x", data=folder))


def npz(path: Path, **arrays: Any) -> TaskData:
    return open_data(TaskConfig(checkpoint="x", data=make_npz(path, **arrays)))


@pytest.mark.parametrize("variant", ["paper", "geolink2"])
@torch.no_grad()
def test_features_are_those_of_the_model(
    variant: str, runs: dict[str, Path], data: TaskData
) -> None:
    model, meta = load_model(runs[variant])
    assert data.tag_table is not None
    model.set_tag_table(torch.from_numpy(data.tag_table))
    batch = next(data.batches("test"))
    assert batch.graph is not None
    images = normalise(batch.image, *meta.band_scale(CPU), meta.nodata)
    image, region = model.embed_image(images), model.encode_region(batch.graph)
    fused = model.fusion_embedding(images, batch.graph, [1])[0].mean((2, 3))
    both = torch.cat([F.normalize(part, dim=1) for part in (image, fused, region)], 1)
    for inputs, expected in (("image", image), ("osm", region), ("image+osm", both)):
        encoder = open_encoder(runs[variant], inputs, data, device=CPU)  # type: ignore[arg-type]
        found = encode(encoder, batch, CPU)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
        assert found.shape[1] == encoder.width


@torch.no_grad()
def test_maps_are_of_four_levels_with_the_fused_one_last(
    runs: dict[str, Path], data: TaskData
) -> None:
    assert levels_of(24) == (7, 11, 15, 23)
    assert levels_of(12) == (3, 5, 7, 11)
    model, meta = load_model(runs["paper"])
    assert data.tag_table is not None
    model.set_tag_table(torch.from_numpy(data.tag_table))
    batch = next(data.batches("test"))
    images = normalise(batch.image, *meta.band_scale(CPU), meta.nodata)
    assert batch.graph is not None
    encoder = open_encoder(runs["paper"], "image+osm", data, device=CPU)
    assert encoder.maps is not None
    found = encoder.maps(encoder.prepare(batch.image), batch.graph)
    expected = model.fusion_embedding(images, batch.graph, list(encoder.levels))
    assert [m.shape[1] for m in found] == list(encoder.widths)
    # With two blocks the third level is the last block, before the fusion.
    for level in (0, 1, 3):
        torch.testing.assert_close(found[level], expected[level], atol=1e-5, rtol=1e-4)


def test_bands_are_found_by_name_then_by_wavelength() -> None:
    def have(*bands: tuple[str, float | None]) -> Imagery:
        return Imagery(tuple(b for b, _ in bands), tuple(w for _, w in bands), "uint8", 0, (8, 8))

    rgb = ("red", "green", "blue")
    assert match_bands(have(("Blue", None), ("Green", None), ("Red", None)), rgb, "c") == [2, 1, 0]
    s2 = have(("B02", 490), ("B03", 560), ("B04", 665), ("B08", 842))
    assert match_bands(s2, (*rgb, "nir"), "c") == [2, 1, 0, 3]
    with pytest.raises(
        GeoLinkError, match=r"c takes band swir16 \(1610 nm\), and none of .*B08 842"
    ):
        match_bands(s2, ("red", "swir16"), "c")
    with pytest.raises(GeoLinkError, match="c takes band vv, and none"):
        match_bands(s2, ("vv",), "c")


def test_a_checkpoint_of_rgb_takes_the_bands_of_another_order(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    image, _ = stripes(90, 0)
    plain = npz(tmp_path / "a.npz")
    turned = npz(
        tmp_path / "b.npz", image=np.concatenate([image[:, ::-1], image[:, :1]], 1),
        bands=np.array(["B2", "B3", "B4", "B8"]), wavelength_nm=np.array([490, 560, 665, 842]),
    )  # fmt: skip
    one, other = (
        encode(open_encoder(runs["paper"], "image", d, device=CPU), next(d.batches("test")), CPU)
        for d in (plain, turned)
    )
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_values_on_another_scale_are_refused_or_scaled_by_the_data(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    image, _ = stripes(90, 0)
    wide = npz(tmp_path / "a.npz", image=image.astype(np.uint16) * 40)
    with pytest.raises(GeoLinkError, match=r"band red of a .* not on the scale .*normalise: data"):
        open_encoder(runs["paper"], "image", wide, device=CPU)
    encoder = open_encoder(runs["paper"], "image", wide, device=CPU, normalise="data")
    pixels = torch.cat([encoder.prepare(b.image) for b in wide.batches("train")])
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-3
    assert (pixels.std((0, 2, 3)) - 1).abs().max() < 1e-2


@torch.no_grad()
def test_images_of_another_size_are_resized_or_positions_interpolated(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    image, _ = stripes(90, 0, size=48)
    large = npz(tmp_path / "a.npz", image=image)
    batch = next(large.batches("test"))
    small = open_encoder(runs["paper"], "image", large, device=CPU)
    assert small.prepare(batch.image).shape[-2:] == (32, 32)
    for variant, prefix in (("paper", 1), ("geolink2", 5)):
        encoder = open_encoder(runs[variant], "image", large, device=CPU, size=48)
        assert encoder.maps is not None
        assert encoder.maps(encoder.prepare(batch.image), None)[-1].shape[-1] == 6
        model, _ = load_model(runs[variant])
        wider = at_size(model, 48)
        assert wider.encode_image(torch.zeros(1, 3, 48, 48)).shape[1] == 36 + prefix
    with pytest.raises(GeoLinkError, match="size is 50, which the model's patches of 8"):
        open_encoder(runs["paper"], "image", large, device=CPU, size=50)


def test_interpolated_positions_lie_between_the_old_ones(runs: dict[str, Path]) -> None:
    model, _ = load_model(runs["paper"])
    wider = at_size(model, 64)
    positions = wider.img_pos_embed[0, 1:].reshape(8, 8, -1)  # type: ignore[union-attr]
    old = grid_sincos(4, TINY.embed_dim)[0, 1:].reshape(4, 4, -1)
    # Two new patches stand where one stood: their mean is about the old position.
    middle = positions.reshape(4, 2, 4, 2, -1).mean((1, 3))
    assert (middle - old).abs().mean() < 0.12
    assert torch.equal(wider.cls_token, model.cls_token)


def test_what_an_encoder_cannot_do_is_said(
    runs: dict[str, Path], data: TaskData, tmp_path: Path
) -> None:
    plain = npz(tmp_path / "a.npz")
    with pytest.raises(GeoLinkError, match=r"a has no OSM objects: .*pair"):
        open_encoder(runs["paper"], "image+osm", plain, device=CPU)
    with pytest.raises(GeoLinkError, match="has no OSM encoder: use inputs: image"):
        open_encoder("random:timm:vit_tiny_patch16_224", "osm", data, device=CPU)
    with pytest.raises(GeoLinkError, match="timm has no model vit_of_nobody"):
        open_encoder("timm:vit_of_nobody", "image", data, device=CPU)
    with pytest.raises(GeoLinkError, match=r"there is no file .*nowhere.pth of weights"):
        open_encoder("timm:vit_tiny_patch16_224@nowhere.pth", "image", data, device=CPU)
    with pytest.raises(GeoLinkError, match="does not exist; give a run folder"):
        open_encoder(tmp_path / "nothing", "image", data, device=CPU)
    wide, _ = load_model(make_checkpoint(tmp_path / "wide", embed_dim=64, num_heads=1))
    state = {name: value.contiguous() for name, value in wide.image_encoder().state_dict().items()}
    save_file(state, tmp_path / "encoder.safetensors")
    with pytest.raises(
        GeoLinkError, match=r"encoder.safetensors has no OSM encoder \(it holds the"
    ):
        open_encoder(tmp_path / "encoder.safetensors", "image+osm", data, device=CPU)


def test_tags_of_another_encoder_are_refused(runs: dict[str, Path], data: TaskData) -> None:
    from dataclasses import replace

    other = replace(data, tag_encoder="clip")
    with pytest.raises(GeoLinkError, match="learnt tags as wordllama encodes them"):
        open_encoder(runs["paper"], "image+osm", other, device=CPU)


def test_objects_told_by_another_lattice_are_refused(runs: dict[str, Path], data: TaskData) -> None:
    with pytest.raises(GeoLinkError, match=r"sees 8 x 8 patches, the objects .* told by 4 x 4"):
        open_encoder(runs["geolink2"], "image+osm", data, device=CPU, size=64)


def test_random_weights_are_new_and_of_their_seed(runs: dict[str, Path], data: TaskData) -> None:
    batch = next(data.batches("test"))
    found = {
        (what, seed): encode(
            open_encoder(f"{what}{runs['paper']}", "image", data, device=CPU, seed=seed), batch, CPU
        )
        for what in ("", "random:")
        for seed in (0, 1)
    }
    assert np.array_equal(found["", 0], found["", 1])
    assert not np.allclose(found["random:", 0], found["random:", 1])
    # The checkpoint's own weights are new ones of seed 0.
    assert np.array_equal(found["random:", 0], found["", 0])


def test_a_copy_is_trained_without_the_original(runs: dict[str, Path], data: TaskData) -> None:
    encoder = open_encoder(runs["paper"], "image", data, device=CPU)
    batch = next(data.batches("test"))
    before = encode(encoder, batch, CPU)
    copy = own_copy(encoder)
    assert copy.module is not None
    with torch.no_grad():
        for parameter in copy.module.parameters():
            parameter.add_(0.1)
    assert np.array_equal(encode(encoder, batch, CPU), before)
    assert not np.allclose(encode(copy, batch, CPU), before)


def test_features_are_made_once(runs: dict[str, Path], data: TaskData, tmp_path: Path) -> None:
    encoder = open_encoder(runs["paper"], "image", data, device=CPU)
    store = FeatureStore(tmp_path, CPU, batch_size=5)
    made = np.array(store.features(encoder, data, "train"))
    whole = np.concatenate([encode(encoder, b, CPU) for b in data.batches("train")])
    np.testing.assert_allclose(made, whole, atol=1e-6)
    (file,) = tmp_path.glob("*.npy")
    before = file.stat().st_mtime_ns
    assert np.array_equal(FeatureStore(tmp_path, CPU, 9).features(encoder, data, "train"), made)
    assert file.stat().st_mtime_ns == before
    other = open_encoder(f"random:{runs['paper']}", "image", data, device=CPU)
    store.features(other, data, "train")
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_features_that_are_not_finite_name_the_image(
    runs: dict[str, Path], data: TaskData, tmp_path: Path
) -> None:
    encoder = own_copy(open_encoder(runs["paper"], "image", data, device=CPU))
    assert encoder.module is not None
    with torch.no_grad():
        next(iter(encoder.module.parameters())).fill_(torch.nan)
    name = str(data.part("test").ids[0])
    with pytest.raises(GeoLinkError, match=f"of image {name} are not finite"):
        FeatureStore(tmp_path, CPU, 4).features(encoder, data, "test")
    assert not list(tmp_path.iterdir())


def test_band_statistics_and_pixels_are_what_they_are_called() -> None:
    images = torch.randn(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    bands = band_features(images).reshape(5, 3, 7).numpy()
    pixels = images.flatten(2).numpy()
    np.testing.assert_allclose(bands[..., 0], pixels.mean(2), atol=1e-6)
    np.testing.assert_allclose(bands[..., 1], pixels.std(2, ddof=1), rtol=1e-5)
    quantiles = np.quantile(pixels, (0.05, 0.25, 0.5, 0.75, 0.95), axis=2, method="nearest")
    np.testing.assert_allclose(bands[..., 2:], np.moveaxis(quantiles, 0, 2))
    assert pixel_features(images).shape == (5, 3 * 16 * 16)
    small = images[:, :, :8, :8]
    assert torch.allclose(pixel_features(small), small.flatten(1))


def test_the_map_alone_says_area_length_and_count_by_class(data: TaskData) -> None:
    batch = next(data.batches("test"))
    graph = batch.graph
    assert graph is not None
    classes = len(data.osm_class_names) + 1
    found = osm_features(graph, classes).reshape(len(batch), 3, classes)
    kind = graph.kind()
    for chip in range(len(batch)):
        for k, code in ((0, 3), (1, 7), (2, 12)):
            there = (graph.chip == chip) & (kind == k) & (graph.osm_class == code)
            amount = there.sum() if k == 0 else graph.size[there].sum()
            assert float(found[chip, k, code]) == pytest.approx(float(np.log1p(amount)), rel=1e-4)
    assert open_dataset(Path(data.about["path"])).info.taxonomy.names == data.osm_class_names
    assert tag_table(open_dataset(Path(data.about["path"]))).shape[1] == TINY.tag_dim
