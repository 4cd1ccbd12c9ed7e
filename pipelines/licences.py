"""Terms of scenes as STAC states them: licence, licensor and link, of the item or its collection.

<https://github.com/radiantearth/stac-spec/blob/master/commons/common-metadata.md>
"""

from collections.abc import Mapping
from typing import Any

from schemas.licences import NO_TERMS, Licence

_SENTINEL = "Sentinel_Data_Legal_Notice"
"""In the address of the terms of all Copernicus Sentinel data, which have no SPDX id."""


def licence_of(item: Mapping[str, Any], collection: Mapping[str, Any]) -> Licence:
    """The terms of an item; of what it does not state, those of its collection.

    collection: its document; empty where there is none. Sentinel data are attributed as their
    legal notice asks for, with the year of the item.
    """
    properties = item["properties"]
    stated = str(properties.get("license") or collection.get("license") or "")
    link = _link(item) or _link(collection)
    url = str(link.get("href") or "")
    source = str(item.get("collection") or collection.get("id") or "scenes")
    providers = properties.get("providers") or collection.get("providers") or []
    attribution = _licensors([p for p in providers if isinstance(p, dict)])
    if stated.lower() in NO_TERMS and _SENTINEL in url:
        year = str(properties.get("datetime") or "")[:4]
        stated = "LicenseRef-Copernicus-Sentinel-Data"
        attribution = f"Contains modified Copernicus Sentinel data {year}".strip()
    elif stated.lower() in NO_TERMS and "public domain" in str(link.get("title") or "").lower():
        stated = "LicenseRef-Public-Domain"
    return Licence(source=source, licence=stated, attribution=attribution, url=url)


def _link(document: Mapping[str, Any]) -> Mapping[str, Any]:
    links = document.get("links") or []
    return next((k for k in links if isinstance(k, dict) and k.get("rel") == "license"), {})


def _licensors(providers: list[dict[str, Any]]) -> str:
    """Names of those who license or produced it; of all providers where none says so."""
    own = [p for p in providers if {"licensor", "producer"} & set(p.get("roles") or [])]
    names = [str(p.get("name") or "") for p in own or providers]
    return ", ".join(dict.fromkeys(name for name in names if name))
