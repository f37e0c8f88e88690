"""Serve a hub on loopback, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pivot_hub.errors import PivotError

if TYPE_CHECKING:
    from starlette.types import ASGIApp


@contextmanager
def serve(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """Serve an application on 127.0.0.1 while the block runs; gives its address.

    Args:
        app: as `protocol.build_app` makes it.
        port: 0 takes a free one.
    """
    import uvicorn

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


def need_server() -> None:
    """Say what is missing for a local hub.

    Raises:
        PivotError: naming the extra.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise PivotError(f"a local hub needs {missing[0]}: pip install 'pivot-hub[local-hub]'.")
