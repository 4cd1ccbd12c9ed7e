"""Command-line arguments that name a dataset: a folder, or an address in an object store."""

from pathlib import Path
from typing import Any

import click


class LocationType(click.ParamType[Path | str]):
    """A path, or `s3://...`, `gs://...`, `az://...` as it is."""

    name = "location"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        """The value as a `schemas.storage.Location`."""
        text = str(value)
        return text.rstrip("/") if "://" in text else Path(text)


LOCATION = LocationType()
