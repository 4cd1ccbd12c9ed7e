"""A real STAC API over a folder of items: run by the environment of requirements.txt.

    python run_api.py FOLDER filter|query

Conditions are taken as CQL2 (`filter`, what the server has of its own) or by the older `query`
extension, which stac-fastapi checks and describes; what it means is then put as CQL2 here.

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
from stac_fastapi.api.models import (
    ItemCollectionUri,
    create_get_request_model,
    create_post_request_model,
)
from stac_fastapi.extensions.core import OffsetPaginationExtension
from stac_fastapi.extensions.core.query import QueryExtension
from stac_fastapi.geoparquet.client import Client
from stac_fastapi.geoparquet.search import FixedSearchGetRequest
from stac_fastapi.geoparquet.settings import Settings
from stac_fastapi.types.search import BaseSearchPostRequest


def main(folder: Path, language: str) -> None:
    """Write the items as stac-geoparquet, and serve them."""
    if language == "query":
        _speak_query()
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


class QueryClient(Client):
    """Answers searches whose conditions stand in `query`."""

    def search(self, *, search: Any, **kwargs: Any) -> Any:
        """A page; its links go on with the same conditions."""
        query = search.query or {}
        tests = [
            {"op": _OPERATORS[op], "args": [{"property": name}, value]}
            for name, conditions in query.items()
            for op, value in conditions.items()
        ]
        if tests:
            kwargs["filter"] = {"op": "and", "args": tests} if len(tests) > 1 else tests[0]
        page = super().search(search=search.model_copy(update={"query": None}), **kwargs)
        for link in page["links"]:
            if query and "body" in link:
                link["body"].pop("filter", None)
                link["body"]["query"] = query
        return page


_OPERATORS = {
    "eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "in": "in",
}  # fmt: skip


def _speak_query() -> None:
    extensions = [OffsetPaginationExtension(), QueryExtension()]
    for name, value in {
        "Client": QueryClient,
        "EXTENSIONS": extensions,
        "PostSearchRequestModel": create_post_request_model(extensions, BaseSearchPostRequest),
        "GetSearchRequestModel": create_get_request_model(extensions, FixedSearchGetRequest),
        "ItemsGetRequestModel": create_get_request_model(extensions, ItemCollectionUri),
    }.items():
        setattr(stac_fastapi.geoparquet.api, name, value)


async def _write(path: Path, items: list[dict[str, Any]]) -> None:
    await rustac.write(str(path), items)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
