"""Buttons that save what is shown as a file: its content goes to the browser as a data URI."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from pivot_hub.demo.gradio_calls import PRIVATE, as_gradio_error

SAVE_AS = """(uri) => {
  if (!uri) return;
  const link = document.createElement("a");
  link.href = uri;
  link.download = "%s";
  link.click();
}"""


def connect_download(
    button: Any, view: Any, file_uri: Any, make: Callable[[Any], bytes], media_type: str, name: str
) -> None:
    """Let a button save a file that is made of the view.

    Args:
        button: Button.
        view: Component that holds the view; None before the first one, and then nothing is saved.
        file_uri: Hidden text field for the content of the file.
        make: Function that makes the content of the view.
        media_type: Media type of the file.
        name: Name of the file.
    """
    saved = button.click(uri_maker(make, media_type), view, file_uri, **PRIVATE)
    saved.then(None, file_uri, js=SAVE_AS % name)


def uri_maker(make: Callable[[Any], bytes], media_type: str) -> Callable[[Any], str]:
    """Return a function that makes the data URI of a view, an empty one of None; see `connect_download`."""

    @as_gradio_error
    def make_uri(view: Any) -> str:
        return "" if view is None else f"data:{media_type};base64,{base64.b64encode(make(view)).decode()}"

    return make_uri


def json_bytes(numbers: dict[str, Any]) -> bytes:
    """Return numbers as the content of a JSON file."""
    return json.dumps(numbers, indent=2).encode()
