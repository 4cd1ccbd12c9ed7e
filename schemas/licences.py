"""Under which terms a dataset's sources are given, and whether they go together.

The table below states what well-known licences ask for. It is no legal advice: it does not look at
who uses what for which purpose, and whether a collection of images and map is a derivative of
either is for lawyers. It claims only that terms of two kinds are known to contradict each other
where the works are combined and passed on: what forbids commercial use or derivatives against
share-alike, and two share-alike licences of different families.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Terms = Literal["open", "share-alike", "non-commercial", "no-derivatives", "unknown"]


class Licence(BaseModel):
    """The terms of one source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Field(description="Collection of scenes, or `OpenStreetMap`.")]
    licence: Annotated[str, Field(description="SPDX id where there is one; empty: not stated.")]
    attribution: Annotated[str, Field(description="Who must be named; empty: nobody stated.")] = ""
    url: Annotated[str, Field(description="Text of the terms; empty: not stated.")] = ""

    @property
    def terms(self) -> Terms:
        """What kind of terms they are, by `TERMS`."""
        name = self.licence.lower()
        for suffix in ("-only", "-or-later"):
            name = name.removesuffix(suffix)
        if name.startswith(("cc-by-nc", "cc-by-nd", "cc-by-sa", "cc-by-")):
            parts = set(name.split("-"))
            if "nd" in parts:
                return "no-derivatives"
            if "nc" in parts:
                return "non-commercial"
            return "share-alike" if "sa" in parts else "open"
        return TERMS.get(name, "unknown")

    @property
    def family(self) -> str:
        """Licences of one family may be combined whatever their version."""
        return "cc-by-sa" if self.licence.lower().startswith("cc-by-sa") else self.licence.lower()


TERMS: dict[str, Terms] = {
    "cc0-1.0": "open", "pddl-1.0": "open", "cc-pddc": "open", "odc-by-1.0": "open",
    "ogl-uk-2.0": "open", "ogl-uk-3.0": "open", "ogl-canada-2.0": "open", "etalab-2.0": "open",
    "dl-de-by-2.0": "open", "dl-de-zero-2.0": "open", "cdla-permissive-2.0": "open",
    "apache-2.0": "open", "mit": "open", "licenseref-public-domain": "open",
    "licenseref-copernicus-sentinel-data": "open", "odbl-1.0": "share-alike",
    "cdla-sharing-1.0": "share-alike",
}  # fmt: skip
"""By SPDX id in lower case; Creative Commons licences are told by their parts."""

OSM = Licence(
    source="OpenStreetMap", licence="ODbL-1.0", attribution="© OpenStreetMap contributors",
    url="https://www.openstreetmap.org/copyright",
)  # fmt: skip

NO_TERMS = ("", "proprietary", "various", "other")
"""What catalogs state where the terms stand elsewhere, or nowhere."""


def distinct(licences: Iterable[Licence]) -> tuple[Licence, ...]:
    """Each once, in order of its fields."""
    return tuple(sorted(set(licences), key=lambda n: (n.source, n.licence, n.attribution, n.url)))


def incompatible(licences: Iterable[Licence]) -> list[tuple[Licence, Licence]]:
    """Pairs whose terms are known to contradict each other."""
    return [(a, b) for a, b in combinations(distinct(licences), 2) if _contradict(a, b)]


def _contradict(a: Licence, b: Licence) -> bool:
    terms = {a.terms, b.terms}
    if terms == {"share-alike"}:
        return a.family != b.family
    return "share-alike" in terms and bool(terms & {"non-commercial", "no-derivatives"})


def licence_findings(licences: Iterable[Licence]) -> dict[str, int]:
    """`licence_unknown`: sources whose terms are not known; `licence_incompatible`: pairs."""
    every = distinct(licences)
    counts = {
        "licence_unknown": len({n.source for n in every if n.terms == "unknown"}),
        "licence_incompatible": len(incompatible(every)),
    }
    return {code: count for code, count in counts.items() if count}
