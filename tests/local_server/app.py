"""The Hub's HTTP protocol over a store: the requests by which huggingface_hub 1.3x and 2.x publish and load.

Written after the client's own requests (huggingface_hub/hf_api.py, _commit_api.py, lfs.py, file_download.py). There is
no Xet: large files travel by git-LFS, to which the client falls back where hf_xet is missing or HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import errno
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import (
    routes_collections,
    routes_commits,
    routes_discussions,
    routes_files,
    routes_repositories,
    routes_uploads,
)
from .hub import Call, Handler, Hub
from .store import TYPES, HubError

# Starlette takes the first route that matches: /api/collections/... also has the form of a repository's path.
ROUTES = [
    *routes_collections.ROUTES,
    *routes_repositories.ROUTES,
    *routes_commits.ROUTES,
    *routes_discussions.ROUTES,
    *routes_uploads.ROUTES,
    *routes_files.ROUTES,
]


def build_app(hub: Hub) -> ASGIApp:
    """Build the ASGI application of a hub."""
    routes = [Route(path, partial(_answer, hub, handler), methods=[method]) for method, path, handler in ROUTES]
    return _RawPath(Starlette(routes=routes))


class _RawPath:
    """Route by the path as it was sent, so that a quoted slash does not end a part of the path."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        await self.app(scope, receive, send)


async def _answer(hub: Hub, handler: Handler, request: Request) -> Response:
    """Run a handler, and turn its errors into the Hub's answers."""
    try:
        if request.path_params.get("type", "models") not in TYPES:
            raise HubError(404, "Not found")
        return await handler(Call(hub, request))
    except HubError as error:
        headers = {"X-Error-Message": error.message, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        return JSONResponse({"error": error.message, **error.extra}, error.status, headers)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return JSONResponse({"error": "Insufficient storage: the hub's disk is full"}, 507)
