"""The app over trained stages: it starts, and its one endpoint draws and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pivot_hub.errors import CheckpointError
from pivot_hub.space import load_app


def test_app_draws_a_scene_under_both_encoders(trained: Path) -> None:
    from gradio_client import Client

    app = load_app(trained)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False)
        figure, said = client.predict(3, "colour", "dpo", "gradient", api_name="/look")
        again, _ = client.predict(4, "colour", "dpo", "gradient", api_name="/look")
    finally:
        app.close()
    assert "SFT answers:" in said
    assert "DPO answers:" in said
    with Image.open(figure) as one, Image.open(again) as other:
        assert one.size[0] > one.size[1] > 100
        assert one.tobytes() != other.tobytes()


def test_missing_stages_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no finished 2-instruct: run `pivot quickstart` first"):
        load_app(tmp_path)
