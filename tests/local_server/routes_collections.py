"""Routes of collections."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Any

from starlette.responses import JSONResponse, Response

from .hub import Call, Routes
from .store import HubError, now


async def _collections(call: Call) -> Response:
    owner = call.request.query_params.get("owner")
    owned = [c for c in call.hub.store.collections if owner in (None, c["owner"]["name"])]
    return JSONResponse(owned)


async def _create_collection(call: Call) -> Response:
    body = await call.json()
    call.writer(body["namespace"])
    title = re.sub(r"\W+", "-", body["title"].lower()).strip("-")
    for known in call.hub.store.collections:
        if known["owner"]["name"] == body["namespace"] and known["title"] == body["title"]:
            raise HubError(409, "This collection already exists", extra={"slug": known["slug"]})
    unique = hashlib.sha1(f"{body['namespace']}/{title}".encode()).hexdigest()[:24]
    created = {
        "slug": f"{body['namespace']}/{title}-{unique}",
        "title": body["title"],
        "description": body.get("description"),
        "owner": {"name": body["namespace"]},
        "items": [],
        "lastUpdated": now(),
        "position": 0,
        "private": bool(body.get("private")),
        "theme": "orange",
        "upvotes": 0,
    }
    call.hub.store.collections.append(created)
    call.hub.store.save_collections()
    return JSONResponse(created)


async def _collection(call: Call) -> Response:
    return JSONResponse(_known_collection(call))


async def _add_item(call: Call) -> Response:
    collection, body = _known_collection(call), await call.json()
    call.writer(call.part("namespace"))
    item = body["item"]
    if (item["type"], item["id"]) not in call.hub.store.repos:
        raise HubError(404, f"{item['id']} does not exist", "RepoNotFound")
    if any((i["type"], i["id"]) == (item["type"], item["id"]) for i in collection["items"]):
        raise HubError(409, "This item is already in the collection")
    note = {"note": {"html": body["note"], "text": body["note"]}} if "note" in body else {}
    collection["items"].append({"_id": secrets.token_hex(12), **item, "position": len(collection["items"]), **note})
    call.hub.store.save_collections()
    return JSONResponse(collection)


def _known_collection(call: Call) -> dict[str, Any]:
    slug = f"{call.part('namespace')}/{call.part('slug')}"
    for collection in call.hub.store.collections:
        if collection["slug"] == slug:
            return collection
    raise HubError(404, f"no collection {slug}")


ROUTES: Routes = [
    ("GET", "/api/collections", _collections),
    ("POST", "/api/collections", _create_collection),
    ("GET", "/api/collections/{namespace}/{slug}", _collection),
    ("POST", "/api/collections/{namespace}/{slug}/items", _add_item),
]
