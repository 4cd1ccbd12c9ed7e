"""The face on top: the `geolink` command. Imports what a command needs when it runs, not before."""

from geolink.cli.main import main

__all__ = ["main"]
