"""The Space: one scene under the maps of the SFT and of the DPO encoder. It draws; `pivot_hub.gradcam` computes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import gradio as gr

from pivot_hub.data.shapes import KINDS, World
from pivot_hub.figure import draw_rows
from pivot_hub.gradcam import EXPLAINS, METHODS, gradient_map
from pivot_hub.mllm import image_px, load_mllm
from pivot_hub.probes.localize import Target
from pivot_hub.probes.vqa import generate_answers

ABOUT = KINDS[:3]  # colour, shape, position: questions about one thing, whose mask is known


def build_app(runs: Path) -> gr.Blocks:
    """Build the app over the stages that `pivot quickstart` left.

    Args:
        runs: folder with 2-instruct, 3-sft and 3-dpo.

    Raises:
        CheckpointError: a stage is missing.
    """
    models = {name: load_mllm(runs / f"3-{name}") for name in ("sft", "dpo")}
    parent = load_mllm(runs / "2-instruct")[0].eval()
    world = World(image_px=image_px(parent))

    def look(seed: float, kind: str, explain: str, method: str) -> tuple[str, str]:
        """Draw the maps of a scene and say what each model answers."""
        scene = world.scene("test", int(seed))
        pair = scene.pair(kind, "question", world.scene_rng("test", int(seed), 1))  # type: ignore[arg-type]
        target = Target(pair, scene.render())
        image, maps, said = target.picture.image, [], [f"**{pair.question}** {pair.chosen}"]
        for name, (model, processor) in models.items():
            made = gradient_map(
                model.eval(),
                processor,
                image,
                pair.question,
                pair.chosen,
                explain,  # type: ignore[arg-type]
                pair.rejected,
                parent,
            )
            maps.append((f"{name.upper()}: {method} of {explain}", made.maps[method]))  # type: ignore[index]
            answer = generate_answers(model, processor, [pair.question], [image])[0]
            said.append(f"{name.upper()} answers: {answer}")
        path = Path(tempfile.mkdtemp()) / "maps.png"
        draw_rows([("what was asked about is outlined", image, target.mask, maps)], path)
        return str(path), "\n\n".join(said)

    with gr.Blocks(title="PIVOT: what SFT and DPO look at", analytics_enabled=False) as app:
        gr.Markdown(
            "# What do the SFT and the DPO encoder look at?\nThe same scene and answer under both, on one scale."
        )
        with gr.Row():
            seed = gr.Number(7, label="Scene", info="any whole number draws another scene", precision=0, minimum=0)
            kind = gr.Dropdown(list(ABOUT), value="shape", label="Ask about")
            explain = gr.Radio(list(EXPLAINS), value="answer", label="Explain", info="the answer, or a loss on it")
            method = gr.Radio(list(METHODS), value="gradcam", label="Map")
        button = gr.Button("Look", variant="primary")
        figure = gr.Image(label="Maps of both encoders", type="filepath", interactive=False)
        answers = gr.Markdown()
        button.click(look, [seed, kind, explain, method], [figure, answers], api_name="look")
        app.load(look, [seed, kind, explain, method], [figure, answers], api_name=False)
    return app


if __name__ == "__main__":
    build_app(Path(os.environ.get("PIVOT_RUNS", "quickstart/runs/shapes"))).launch()
