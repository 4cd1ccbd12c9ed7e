"""Terms that contradict each other are found; terms that nobody knows are said to be unknown."""

from itertools import permutations

import pytest

from schemas.dataset import DatasetInfo
from schemas.licences import OSM, Licence, distinct, incompatible, licence_findings
from tests.shards import make_info


def of(name: str, source: str = "scenes") -> Licence:
    return Licence(source=source, licence=name)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("CC0-1.0", "open"), ("CC-BY-4.0", "open"), ("cc-by-3.0-igo", "open"),
        ("CC-BY-SA-4.0", "share-alike"), ("ODbL-1.0", "share-alike"),
        ("CC-BY-NC-4.0", "non-commercial"), ("CC-BY-NC-SA-4.0", "non-commercial"),
        ("CC-BY-ND-4.0", "no-derivatives"), ("CC-BY-NC-ND-4.0", "no-derivatives"),
        ("LicenseRef-Copernicus-Sentinel-Data", "open"), ("proprietary", "unknown"),
        ("various", "unknown"), ("other", "unknown"), ("", "unknown"), ("EULA of 2019", "unknown"),
    ],
)  # fmt: skip
def test_what_well_known_licences_ask_for(name: str, terms: str) -> None:
    assert of(name).terms == terms


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["CC0-1.0", "CC-BY-4.0"], 0),
        (["CC-BY-NC-4.0"], 1),
        (["CC-BY-ND-4.0", "CC0-1.0"], 1),
        (["CC-BY-SA-4.0"], 1),
        (["CC-BY-SA-3.0", "CC-BY-SA-4.0"], 2),
        (["proprietary"], 0),
    ],
)
def test_what_cannot_be_combined_with_openstreetmap(names: list[str], pairs: int) -> None:
    sources = [OSM, *(of(n, f"source of {n}") for n in names)]
    for some in permutations(sources):
        assert len(incompatible(some)) == pairs
        assert licence_findings(some).get("licence_incompatible", 0) == pairs


def test_sources_of_unknown_terms_are_counted_once() -> None:
    sources = [of("", "a"), of("proprietary", "a"), of("other", "b"), OSM]
    assert licence_findings(sources) == {"licence_unknown": 2}


def test_a_dataset_says_each_licence_and_each_name_once() -> None:
    sentinel = [
        Licence(source="s2", licence="x", attribution=f"Copernicus {year}") for year in (2024, 2023)
    ]
    info = make_info(licences=distinct([*sentinel, OSM, of("", "drone"), OSM]))
    assert info.licence == "OpenStreetMap: ODbL-1.0; drone: not stated; s2: x"
    assert info.attribution == ("© OpenStreetMap contributors", "Copernicus 2023",
                                "Copernicus 2024")  # fmt: skip
    assert DatasetInfo.model_validate_json(info.model_dump_json()) == info
