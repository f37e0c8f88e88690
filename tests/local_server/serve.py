"""Serve a hub on loopback, in a thread of this process."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from pivot_hub.errors import PivotError

from .app import build_app
from .hub import Account, Hub
from .store import Store


@contextmanager
def serve(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """Serve an application on 127.0.0.1 while the block runs.

    Args:
        app: Application, such as that of `app.build_app`.
        port: Port to listen on; 0 selects a free one.

    Yields:
        Address of the server.

    Raises:
        PivotError: The port is taken.
    """
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise PivotError(f"the local hub cannot listen on port {port}; choose another.")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serve_folder(folder: Path, owner: str) -> Iterator[tuple[str, str]]:
    """Serve a hub that keeps its repositories in a folder, with one account, while the block runs.

    Args:
        folder: Folder of the hub's state, which is created if it does not exist.
        owner: Organisation that the account may write to.

    Yields:
        Address of the hub, and a token of the account that is valid while the hub is served.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = f"hf_{secrets.token_hex(17)}"
    with serve(build_app(Hub(Store(folder), {token: Account("quickstart", (owner,))}))) as address:
        yield address, token
