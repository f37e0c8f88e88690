"""How Gradio calls the functions behind the page: its queues, and the files that visitors upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from pivot_hub.errors import DataError

# One call at a time, in the order of arrival: computing a saliency map registers hooks on a shared model.
QUEUE: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
# Values arrive unprocessed: Gradio's own decoding would answer a damaged image with an error of Pillow. They are
# validated by `upload_path`, `read_upload` and `ViewState`.
UNPROCESSED: dict[str, Any] = {**QUEUE, "preprocess": False}
# Programs have a queue of their own, and so have visitors who load other models, which may take minutes to download:
# neither keeps the other visitors waiting.
PROGRAMS: dict[str, Any] = {**UNPROCESSED, "concurrency_id": "programs"}
LOADING: dict[str, Any] = {"concurrency_id": "loading", "concurrency_limit": 4}
# Functions of the page itself. An input that arrives during a call is not dropped: the last one is run afterwards.
PRIVATE: dict[str, Any] = {
    **UNPROCESSED,
    "api_visibility": "private",
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}


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
