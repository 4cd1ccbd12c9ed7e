"""A real STAC API over a folder of items: run by the environment of requirements.txt.

    python run_api.py FOLDER

FOLDER holds `collections.json` (a list) and `items/<collection>.json` (lists of items). Prints the
port, then serves until it is killed.
"""

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

import rustac
import rustac_duckdb_extensions
import stac_fastapi.geoparquet.api
import uvicorn
from stac_fastapi.geoparquet.settings import Settings


def main(folder: Path) -> None:
    """Write the items as stac-geoparquet, and serve them."""
    collections = json.loads((folder / "collections.json").read_text())
    for collection in collections:
        parquet = folder / f"{collection['id']}.parquet"
        items = json.loads((folder / "items" / f"{collection['id']}.json").read_text())
        asyncio.run(_write(parquet, items))
        collection["links"] = []
        collection["assets"] = {
            "data": {"href": str(parquet), "type": "application/vnd.apache.parquet"}
        }
    (folder / "served.json").write_text(json.dumps(collections))
    settings = Settings(
        stac_fastapi_landing_id="world",
        stac_fastapi_title="world",
        stac_fastapi_description="made-up",
        stac_fastapi_collections_href=str(folder / "served.json"),
    )
    client = rustac.DuckdbClient(
        extension_directory=str(rustac_duckdb_extensions.extension_directory()),
        install_extensions=False,
    )
    app = stac_fastapi.geoparquet.api.create(settings, client).app
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)  # noqa: T201
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


async def _write(path: Path, items: list[dict[str, Any]]) -> None:
    await rustac.write(str(path), items)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
