"""The OSM class taxonomy: which tags make which class, and how classes are drawn.

Users extend or replace it with a YAML file of the form of `taxonomy.yaml`.
"""

from functools import lru_cache
from importlib.resources import files
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class TaxonomyClass(BaseModel):
    """One class: its tags and how it is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", description="Name of the class.")]
    color: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$", description="Colour in pictures.")]
    rules: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="`key=value`, or `key=*` for any value but `no`."),
    ]
    width_m: Annotated[
        float | None, Field(gt=0, description="Drawn width of its lines; none: lines not drawn.")
    ] = None
    widths: Annotated[
        dict[str, float], Field(description="Drawn width by rule, where it differs.")
    ] = Field(default_factory=dict)

    @field_validator("rules")
    @classmethod
    def _rules(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            key, sep, value = rule.partition("=")
            if not (key and sep and value):
                raise ValueError(f"rule {rule!r} is not of the form key=value or key=*")
        return rules

    @model_validator(mode="after")
    def _widths_are_rules(self) -> "TaxonomyClass":
        for rule in self.widths:
            if rule not in self.rules:
                raise ValueError(f"width for {rule!r}, which is no rule of class {self.name!r}")
        return self


class Taxonomy(BaseModel):
    """Classes in drawing order; class id = position + 1, 0 = no OSM statement."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: Annotated[tuple[TaxonomyClass, ...], Field(min_length=1, max_length=254)]

    @model_validator(mode="after")
    def _unique(self) -> "Taxonomy":
        seen: dict[str, str] = {}
        for c in self.classes:
            if c.name in seen.values():
                raise ValueError(f"class {c.name!r} is given twice")
            for rule in c.rules:
                if rule in seen:
                    raise ValueError(f"rule {rule!r} stands in both {seen[rule]!r} and {c.name!r}")
                seen[rule] = c.name
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; index = class id - 1."""
        return tuple(c.name for c in self.classes)


@lru_cache(maxsize=1)
def default_taxonomy() -> Taxonomy:
    """The taxonomy that ships with the product."""
    text = files("schemas").joinpath("taxonomy.yaml").read_text(encoding="utf-8")
    return Taxonomy.model_validate(yaml.safe_load(text))
