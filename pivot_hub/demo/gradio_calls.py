"""How Gradio calls the functions behind the page: its queues, its errors, and the files that visitors upload."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from pivot_hub.errors import DataError, PivotError

LOG = logging.getLogger(__name__)
UNEXPECTED = "This did not work, for a reason that the app does not know; its log has the details. Try other values."
# Models that visitors named may take minutes, so several calls are served at a time: more than `WorkerLimits` lets wait
# for such models, with the other calls of their visitors. `ModelBundle.exclusive` and `Turns` keep calls in order.
QUEUE: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 40}
MOST_THREADS = 80  # for all queues together
# Values arrive unprocessed: Gradio's own decoding would answer a damaged image with an error of Pillow. They are
# validated by `upload_path`, `read_upload` and `ViewState`.
UNPROCESSED: dict[str, Any] = {**QUEUE, "preprocess": False}
# Programs have a queue of their own, and so have visitors who load other models, which may take minutes to download:
# neither keeps the other visitors waiting.
PROGRAMS: dict[str, Any] = {**UNPROCESSED, "concurrency_id": "programs", "concurrency_limit": 12}
LOADING: dict[str, Any] = {"concurrency_id": "loading", "concurrency_limit": 12}
# Functions of the page itself. Every input is sent, and `Turns` drops those that a later one replaces: Gradio's own
# "always_last" loses which example or patch was clicked.
PRIVATE: dict[str, Any] = {
    **UNPROCESSED,
    "api_visibility": "private",
    "show_progress": "hidden",
    "trigger_mode": "multiple",
}


def error_message(error: Exception) -> str:
    """Return the message of an error for visitors; an unexpected error is logged, and its text stays here."""
    if isinstance(error, PivotError):
        return str(error)
    LOG.error("An unexpected error in a call of the app.", exc_info=error)
    return UNEXPECTED


def as_gradio_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that each of its errors is one of Gradio's, which carries its message to the caller."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except Exception as error:
            raise gr.Error(error_message(error), print_exception=False) from error

    return run


def name_bad_inputs(app: gr.Blocks) -> None:
    """Give the callers of an app a message for values that Gradio itself refuses before it calls a function.

    Args:
        app: App whose inputs are checked.
    """
    preprocess = app.preprocess_data

    @functools.wraps(preprocess)
    async def checked(*arguments: Any, **named: Any) -> Any:
        try:
            return await preprocess(*arguments, **named)
        except gr.Error:
            raise
        except Exception as error:
            LOG.info("An input of the wrong type: %s", error)
            raise gr.Error(
                "An input is not of its type. An image has to be uploaded to this app first; the types are in its API "
                "description.",
                print_exception=False,
            ) from None

    app.preprocess_data = checked  # type: ignore[method-assign]


def upload_path(value: Any) -> Path | None:
    """Return the file behind the unprocessed value of an image input, which must be an upload to this app.

    Gradio 6.31 checks this itself only if the sender marked the value as a file.

    Args:
        value: Value that the page or a program sent.

    Returns:
        The file; None if the input is empty.

    Raises:
        DataError: The value is not a file that was uploaded to this app.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise DataError("This is not an image that was uploaded here; upload it again.")
    return Path(path)


def png_path(png: bytes) -> str:
    """Store a PNG where Gradio serves files from and deletes them: it would decode and encode an image again."""
    return save_bytes_to_cache(png, "figure.png", get_upload_folder())
