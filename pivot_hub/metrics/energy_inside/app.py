"""Space of this metric, with evaluate's own widget."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("energy_inside.py"))))
