"""Model class for lmms-eval; `python -m pivot_hub.probes.vqa.lmms_model` is lmms-eval's command line with this class.

It runs in the environment that has lmms-eval. lmms-eval's own `llava_hf` is not used, because it always writes
`<image>` for the image, whatever the model's image token is, answers one question at a time, and continues with an
empty answer if generation fails.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

MODEL = "pivot"
TASKS = Path(__file__).parent / "tasks"
# Stop string that lmms-eval adds for prompts with examples, if a task names no stop.
_BETWEEN_EXAMPLES = "\n\n"
# Default of lmms-eval's llava_hf, for tasks that set no limit.
MAX_NEW_TOKENS = 1024


def import_torchvision() -> None:
    """Make torchvision importable beside a CPU torch.

    PyPI's torchvision contains CUDA kernels only. Its Python part, which lmms-eval's packages import, needs two
    operators to be defined.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # operators disappear when their library is garbage-collected
        importlib.import_module("torchvision")


_LIBRARIES: list[torch.library.Library] = []
import_torchvision()

from lmms_eval.api.model import lmms  # noqa: E402
from tqdm import tqdm  # noqa: E402

from pivot_hub.encoder.device import compute_device  # noqa: E402
from pivot_hub.encoder.encode import DTYPES  # noqa: E402
from pivot_hub.mllm.load import load_mllm  # noqa: E402
from pivot_hub.probes.vqa.lmms_eval import WATCHED  # noqa: E402
from pivot_hub.probes.vqa.synthetic import generate_answers  # noqa: E402


class PivotMllm(lmms):
    """A stage checkpoint that answers lmms-eval's questions as `generate_answers` does.

    Args:
        pretrained: Folder of the checkpoint.
        batch_size: Number of questions in one forward pass.
        device: Device to compute on; by default CUDA if it is available, else the CPU.
        dtype: float32, float16 or bfloat16.
        max_batch_size: Argument of lmms-eval for models that search for a batch size; not used here.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        model, self.processor = load_mllm(pretrained)
        module: Any = model  # transformers types `to` as for one argument
        self.model = module.to(device or compute_device(), DTYPES[dtype])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests in their order; those with the same length limit and stops share forward passes."""
        by_limits: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            by_limits.setdefault(_limits(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", mininterval=10) as bar:
            for (longest, stops), indices in by_limits.items():
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    arguments = [requests[i].args for i in batch]
                    images = [
                        to_images(self.task_dict[task][split][row]) or []
                        for _, _, to_images, row, task, split in arguments
                    ]
                    questions = [a[0] for a in arguments]
                    texts = generate_answers(self.model, self.processor, questions, images, longest, self.batch_size)
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = _cut(text, stops)
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a task that scores given answers cannot be run; choose one that lets a model answer")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("a task of several rounds cannot be run; choose one of single questions")


def _limits(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Read the length limit and the stops of a task's generation options; only greedy decoding is allowed."""
    if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
        raise ValueError(f"the task asks for sampling or beams ({options}); answers here are greedy")
    stops = options.get("until") or []
    listed = [stops] if isinstance(stops, str) else stops
    return options.get("max_new_tokens", MAX_NEW_TOKENS), tuple(s for s in listed if s != _BETWEEN_EXAMPLES)


def _cut(answer: str, stops: tuple[str, ...]) -> str:
    return min((answer.split(stop, 1)[0] for stop in stops), key=len, default=answer).strip()


def main() -> None:
    """Run lmms-eval's command line with this model and our tasks; errors are raised, not only logged."""
    from lmms_eval.__main__ import cli_evaluate_single, parse_eval_args
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    from tenacity import RetryError

    if os.environ.get(WATCHED):
        leave_with_parent()
    path = f"pivot_hub.probes.vqa.lmms_model.{PivotMllm.__name__}"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(MODEL, simple_class_path=path))
    _, args = parse_eval_args()
    if args.include_path:
        _refuse_taken_names(args.tasks.split(","), args.include_path)
    args.include_path = [str(TASKS), *([args.include_path] if args.include_path else [])]
    # MMMU draws a random letter for an answer it cannot read. With several threads the draws would not repeat.
    args.process_docs_parallel = 1
    try:
        cli_evaluate_single(args)
    except RetryError as error:  # a data set could not be fetched in five attempts
        error.reraise()


def leave_with_parent() -> None:
    """End this process when its standard input ends, which happens when the parent process is killed."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _refuse_taken_names(tasks: list[str], folder: str) -> None:
    """Raise an error if a task has the name of one of lmms-eval's tasks, which lmms-eval would silently run instead."""
    from lmms_eval.tasks import TaskManager

    own = TaskManager("ERROR", include_path=folder, include_defaults=False).task_index
    taken = own.keys() & set(tasks) & TaskManager("ERROR").task_index.keys()
    if taken:
        raise ValueError(f"lmms-eval has a task {sorted(taken)[0]} of its own; give the one in {folder} another name")


if __name__ == "__main__":
    main()
