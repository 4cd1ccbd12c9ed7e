"""The DuckDB catalog of a dataset: its DDL and version."""

from importlib.resources import files

CATALOG_VERSION = 2


def catalog_ddl() -> str:
    """SQL that creates the catalog's tables where they are missing."""
    return files("schemas").joinpath("catalog.sql").read_text(encoding="utf-8")
