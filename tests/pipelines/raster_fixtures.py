"""Small real rasters and STAC catalogs for tests, and servers for them on loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform_bounds

from schemas.sensor import Band, Mask, Sensor

X0, Y0, EPSG = 600_000, 5_300_000, 32632
"""North-west corner of the test scenes, on every grid up to 60 m."""

SENSOR = Sensor(
    name="test-s2",
    bands=(
        Band(name="red", asset="red|B04"),
        Band(name="nir", asset="nir|B08"),
        Band(name="swir", asset="swir|B11"),
    ),
    dtype="uint16",
    mask=Mask(asset="scl|SCL", invalid=(0, 3, 8, 9)),
    radiometry="sentinel-2",
)
PLAIN = SENSOR.model_copy(update={"radiometry": "none"})
"""The same without offsets."""
RESOLUTION = {"red": 10, "nir": 10, "swir": 20, "scl": 20}


def random_dn(seed: int, shape: tuple[int, ...], low: int = 1100) -> NDArray[np.uint16]:
    """Digital numbers without structure, so that a shift by a pixel shows."""
    return np.random.default_rng(seed).integers(low, 9000, shape, dtype=np.uint16)


def write_tif(
    path: Path,
    array: NDArray[Any],
    gsd_m: float,
    *,
    x0: float = X0,
    y0: float = Y0,
    epsg: int | None = EPSG,
    nodata: float | None = 0,
    driver: str = "COG",
    transform: Affine | None = None,
    **options: Any,
) -> Path:
    """Write [y, x] or [band, y, x] as a GeoTIFF whose north-west corner is (x0, y0) metres."""
    bands = array if array.ndim == 3 else array[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver=driver, count=len(bands), height=bands.shape[1], width=bands.shape[2],
        dtype=bands.dtype, crs=f"EPSG:{epsg}" if epsg else None, nodata=nodata,
        transform=transform or from_origin(x0, y0, gsd_m, gsd_m), **options,
    ) as file:  # fmt: skip
        file.write(bands)
    return path


def write_scene(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    size_m: int = 2560,
    x0: float = X0,
    y0: float = Y0,
    epsg: int = EPSG,
    scl: NDArray[np.uint8] | None = None,
    cloud: float | None = 5.0,
    time: str = "2024-06-01T10:00:00Z",
    baseline: str = "05.09",
    legacy: bool = False,
    **properties: Any,
) -> dict[str, Any]:
    """Write the files of a Sentinel-2-like scene and return its STAC item.

    legacy: STAC 1.0 with `proj:epsg`; else 1.1 with `proj:code`.
    """
    assets = {}
    for n, (band, gsd_m) in enumerate(RESOLUTION.items()):
        side = size_m // gsd_m
        array: NDArray[Any] = random_dn(seed * 100 + n, (side, side))
        if band == "scl":
            array = np.full((side, side), 4, np.uint8) if scl is None else scl
        path = write_tif(folder / name / f"{band}.tif", array, gsd_m, x0=x0, y0=y0, epsg=epsg)
        assets[band] = {
            "href": f"./{path.name}",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "proj:shape": list(array.shape),
            "proj:transform": [gsd_m, 0, x0, 0, -gsd_m, y0],
        }
    box = transform_bounds(f"EPSG:{epsg}", "EPSG:4326", x0, y0 - size_m, x0 + size_m, y0)
    west, south, east, north = box
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    code = {"proj:epsg": epsg} if legacy else {"proj:code": f"EPSG:{epsg}"}
    item = {
        "type": "Feature",
        "stac_version": "1.0.0" if legacy else "1.1.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/"
            + ("v1.0.0/schema.json" if legacy else "v2.0.0/schema.json")
        ],
        "id": name,
        "bbox": list(box),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "datetime": time, "eo:cloud_cover": cloud, "s2:processing_baseline": baseline,
            **code, **properties,
        },
        "links": [],
        "assets": assets,
    }  # fmt: skip
    if cloud is None:
        del item["properties"]["eo:cloud_cover"]
    return item


def write_catalog(folder: Path, items: list[dict[str, Any]], collection: str = "test-l2a") -> Path:
    """Write a static catalog of one collection around items made by `write_scene`."""
    for item in items:
        item["collection"] = collection
        item["links"] = [
            {"rel": "root", "href": "../catalog.json"},
            {"rel": "parent", "href": "../collection.json"},
            {"rel": "collection", "href": "../collection.json"},
        ]
        path = folder / item["id"] / "item.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(item))
    extent = {
        "spatial": {"bbox": [[-180, -90, 180, 90]]},
        "temporal": {"interval": [["2020-01-01T00:00:00Z", None]]},
    }
    document = {
        "type": "Collection", "stac_version": "1.0.0", "id": collection, "description": "test",
        "license": "CC-BY-4.0", "extent": extent,
        "links": [{"rel": "root", "href": "./catalog.json"}]
        + [{"rel": "item", "href": f"./{i['id']}/item.json"} for i in items],
    }  # fmt: skip
    (folder / "collection.json").write_text(json.dumps(document))
    root = {
        "type": "Catalog", "stac_version": "1.0.0", "id": "root", "description": "test",
        "links": [{"rel": "child", "href": "./collection.json"}],
    }  # fmt: skip
    (folder / "catalog.json").write_text(json.dumps(root))
    return folder / "catalog.json"


class _Files(SimpleHTTPRequestHandler):
    """Static files with byte ranges; `fault` answers everything below a path with an error."""

    fault: tuple[str, int] | None = None

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        """Answer with a whole file or a range of it."""
        path = Path(self.translate_path(self.path))
        if self.fault and self.path.startswith(self.fault[0]):
            self.send_error(self.fault[1])
        elif not path.is_file():
            self.send_error(404)
        else:
            data = path.read_bytes()
            self._send(data, self.headers.get("Range"))

    def _send(self, data: bytes, wanted: str | None) -> None:
        first, last = 0, len(data) - 1
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            if first > last:
                self.send_error(416)
                return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


@contextmanager
def serve_files(folder: Path, fault: tuple[str, int] | None = None) -> Iterator[str]:
    """Serve a folder over HTTP; yields the address of its root."""
    handler = type("Handler", (_Files,), {"fault": fault})
    with _running(partial(handler, directory=str(folder))) as address:
        yield address


@contextmanager
def serve_api(items: list[dict[str, Any]], page: int = 2) -> Iterator[str]:
    """A small STAC API (core, collections, item search with paging) over items; yields its root."""

    class Api(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            self._answer(parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._answer(urlsplit(self.path).path, json.loads(self.rfile.read(length)))

        def _answer(self, path: str, query: dict[str, Any]) -> None:
            host = f"http://{self.headers['Host']}"
            body: dict[str, Any] = {
                "type": "Catalog", "stac_version": "1.0.0", "id": "api", "description": "test",
                "conformsTo": [
                    "https://api.stacspec.org/v1.0.0/core",
                    "https://api.stacspec.org/v1.0.0/item-search",
                    "https://api.stacspec.org/v1.0.0/collections",
                ],
                "links": [
                    {"rel": "self", "href": host}, {"rel": "root", "href": host},
                    {"rel": "data", "href": f"{host}/collections"},
                    {"rel": "search", "href": f"{host}/search", "method": "GET"},
                    {"rel": "search", "href": f"{host}/search", "method": "POST"},
                ],
            }  # fmt: skip
            if path == "/search":
                body = self._search(host, query)
            elif path.startswith("/collections/"):
                body = {
                    "type": "Collection", "stac_version": "1.0.0", "id": path.split("/")[2],
                    "description": "test", "license": "CC-BY-4.0", "links": [],
                    "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]},
                               "temporal": {"interval": [[None, None]]}},
                }  # fmt: skip
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _search(self, host: str, query: dict[str, Any]) -> dict[str, Any]:
            box = query.get("bbox", [-180, -90, 180, 90])
            w, s, e, n = [float(v) for v in (box.split(",") if isinstance(box, str) else box)]
            first, last = (query.get("datetime") or "../..").split("/")
            found = [
                i for i in items
                if i["bbox"][0] <= e and w <= i["bbox"][2] and i["bbox"][1] <= n
                and s <= i["bbox"][3]
                and (first == ".." or i["properties"]["datetime"] >= first)
                and (last == ".." or i["properties"]["datetime"] <= last)
                and i["collection"] in query.get("collections", [i["collection"]])
            ]  # fmt: skip
            start = int(query.get("token", 0))
            body: dict[str, Any] = {
                "type": "FeatureCollection", "features": found[start : start + page], "links": [],
            }  # fmt: skip
            if start + page < len(found):
                body["links"] = [
                    {
                        "rel": "next", "href": f"{host}/search", "method": "POST",
                        "body": {**query, "token": start + page},
                    }
                ]  # fmt: skip
            return body

    with _running(Api) as address:
        yield address


@contextmanager
def _running(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
