"""The Space that shows what DPO changed: it starts the page, whose parts are in `pivot_hub.demo`."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ZeroGPU's package has to be imported before torch. In a checkout, `spaces` is a folder without a file to import.
_zero_gpu = importlib.util.find_spec("spaces")
if _zero_gpu is not None and _zero_gpu.origin is not None:
    import spaces

    on_gpu: Callable[[Any], Any] = vars(spaces)["GPU"]
else:

    def on_gpu(function: Any) -> Any:
        """Return the function unchanged, as there is no ZeroGPU."""
        return function


import gradio as gr  # noqa: E402

from pivot_hub.demo.bundle_cache import BundleCache  # noqa: E402
from pivot_hub.demo.encoder_cache import EncoderCache  # noqa: E402
from pivot_hub.demo.encoder_endpoints import add_encoder_endpoint  # noqa: E402
from pivot_hub.demo.encoder_html import EncoderPanels  # noqa: E402
from pivot_hub.demo.encoder_page import Tabs, build_encoder_page, connect_encoder_events  # noqa: E402
from pivot_hub.demo.encoder_service import EncoderService  # noqa: E402
from pivot_hub.demo.encoder_state import MODE  # noqa: E402
from pivot_hub.demo.endpoints import add_endpoints  # noqa: E402
from pivot_hub.demo.gradio_calls import MOST_THREADS, name_bad_inputs  # noqa: E402
from pivot_hub.demo.html import Panels  # noqa: E402
from pivot_hub.demo.model_bundle import BundleNames  # noqa: E402
from pivot_hub.demo.page_events import connect_events  # noqa: E402
from pivot_hub.demo.page_layout import TITLE, build_page  # noqa: E402
from pivot_hub.demo.service import DemoService  # noqa: E402
from pivot_hub.demo.view_state import ViewState  # noqa: E402
from pivot_hub.demo.worker import WorkerLimits, WorkerPool  # noqa: E402

HERE = Path(__file__).parent
MOST_WAITING = 200
THEME = gr.themes.Default(
    font=[gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")],
    font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")],
    primary_hue="indigo",
).set(  # Gradio's own greys have too little contrast
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    # The accent colours have a contrast of at least 4.5 with what is behind and on them.
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    color_accent="*primary_600",
)
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css_paths": HERE / "style.css",
    "footer_links": ["api", "settings"],
    # On a narrow screen Gradio leaves its API button out, but not the separator behind it.
    "head": "<style>@media (max-width: 640px) { footer > .divider { display: none !important } }</style>",
    "max_file_size": "20mb",
    "ssr_mode": False,
    "max_threads": MOST_THREADS,
    "mcp_server": importlib.util.find_spec("mcp") is not None,
}


def build_app(
    names: BundleNames = BundleNames(), runs: Path | None = None, limits: WorkerLimits | None = None
) -> gr.Blocks:
    """Build the app, and load the models, which all visitors share.

    Args:
        names: Names of the models to start with; the shipped bundle by default.
        runs: Folder of checkpoints that visitors may name besides repositories of the Hub.
        limits: Limits of the processes that run the repositories which visitors name.

    Raises:
        CheckpointError: The models cannot be loaded.
    """
    service = DemoService(BundleCache(names, runs), Panels(HERE), on_gpu, WorkerPool(limits, runs))
    encoder_service = EncoderService(EncoderCache(service.bundles), service.workers, on_gpu)
    examples = [ViewState(**choices) for choices in json.loads((HERE / "examples.json").read_text())]
    shown = [(service.subject(example), example) for example in examples]
    script = (HERE / "panels.js").read_text()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        with gr.Tabs(elem_id="modes") as modes:
            with gr.Tab("SFT vs DPO", id="mllms") as mllms_tab:
                page = build_page(
                    service.panels.gallery(shown), script, service.default_bundle.layers, service.bundles.local_names()
                )
            with gr.Tab("Any two encoders", id=MODE) as encoders_tab:
                encoder_page = build_encoder_page(
                    (HERE / "encoders.js").read_text(), encoder_service.encoders.local_names()
                )
        connect_events(app, page, service, examples)
        tabs = Tabs(modes, mllms_tab, encoders_tab, page.results.link)
        connect_encoder_events(app, encoder_page, encoder_service, EncoderPanels(HERE), service.panels, tabs)
        add_endpoints(service)
        add_encoder_endpoint(encoder_service)
    name_bad_inputs(app)
    return app.queue(max_size=MOST_WAITING)


def names_from_environment() -> tuple[BundleNames, Path | None]:
    """Return the models to start with, and the folder of checkpoints that visitors may name.

    The models come from PIVOT_FIRST, PIVOT_SECOND and PIVOT_PARENT, or from the file that `pivot push --space` wrote;
    the folder comes from PIVOT_RUNS.
    """
    file = HERE / "pair.json"
    pushed = json.loads(file.read_text()) if file.is_file() else {}
    roles = ("first", "second", "parent")
    first, second, parent = (os.environ.get(f"PIVOT_{role.upper()}", pushed.get(role, "")) for role in roles)
    runs = os.environ.get("PIVOT_RUNS")
    return BundleNames(first, second, parent), Path(runs) if runs else None


if __name__ == "__main__":
    build_app(*names_from_environment()).launch(**LAUNCH)
