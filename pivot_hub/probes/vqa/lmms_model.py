"""An MLLM of ours in lmms-eval; `python -m pivot_hub.probes.vqa.lmms_model` is lmms-eval's command line with it.

It runs in the environment that has lmms-eval. lmms-eval's own `llava_hf` is not used: it writes `<image>` for the
image where our vocabulary has another token, answers one question at a time, and goes on with an empty answer where
generation fails.
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
# What lmms-eval fills in as a stop where a task names none, for prompts with examples.
_BETWEEN_EXAMPLES = "\n\n"
# Where a task sets no limit; that of lmms-eval's llava_hf.
MAX_NEW_TOKENS = 1024


def import_torchvision() -> None:
    """Make torchvision importable beside a CPU torch.

    PyPI's torchvision holds CUDA kernels only; its Python part, which lmms-eval's packages import, needs the names of
    two operators.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # its operators vanish with it
        importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []
import_torchvision()

from lmms_eval.api.model import lmms  # noqa: E402
from tqdm import tqdm  # noqa: E402

from pivot_hub.encoder.encode import DTYPES  # noqa: E402
from pivot_hub.mllm.load import load_mllm  # noqa: E402
from pivot_hub.probes.vqa.lmms_eval import WATCHED  # noqa: E402
from pivot_hub.probes.vqa.synthetic import generate_answers  # noqa: E402


class PivotMllm(lmms):
    """A stage checkpoint that answers lmms-eval's questions as `generate_answers` does.

    Args:
        pretrained: its folder.
        batch_size: questions of one pass.
        device: cuda where there is one, else cpu.
        dtype: float32, float16 or bfloat16.
        max_batch_size: lmms-eval's, for models that look for a size.
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
        self.model = module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[dtype])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests; those of one length limit and one set of stops share passes."""
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(_limits(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", mininterval=10) as bar:
            for (longest, stops), indices in alike.items():
                for start in range(0, len(indices), self.batch_size):
                    some = indices[start : start + self.batch_size]
                    asked = [requests[i].args for i in some]
                    images = [see(self.task_dict[task][split][row]) or [] for _, _, see, row, task, split in asked]
                    said = generate_answers(
                        self.model, self.processor, [a[0] for a in asked], images, longest, self.batch_size
                    )
                    for i, answer in zip(some, said, strict=True):
                        answers[i] = _cut(answer, stops)
                    bar.update(len(some))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a task that scores given answers cannot be run; choose one that lets a model answer")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("a task of several rounds cannot be run; choose one of single questions")


def _limits(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Length limit and stops of a task's generation options; what would not be greedy is refused."""
    if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
        raise ValueError(f"the task asks for sampling or beams ({options}); answers here are greedy")
    stops = options.get("until") or []
    named = [stops] if isinstance(stops, str) else stops
    return options.get("max_new_tokens", MAX_NEW_TOKENS), tuple(s for s in named if s != _BETWEEN_EXAMPLES)


def _cut(answer: str, stops: tuple[str, ...]) -> str:
    return min((answer.split(stop, 1)[0] for stop in stops), key=len, default=answer).strip()


def main() -> None:
    """lmms-eval's command line, with our model and tasks added; an error is raised, not only logged."""
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
    # MMMU draws a letter where it can read none: in threads the draws would fall differently each time.
    args.process_docs_parallel = 1
    try:
        cli_evaluate_single(args)
    except RetryError as error:  # a data set that cannot be fetched, tried five times
        error.reraise()


def leave_with_parent() -> None:
    """End this process when its standard input ends, which that of a process that was killed does."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _refuse_taken_names(tasks: list[str], folder: str) -> None:
    """Of two tasks of one name lmms-eval runs its own, without a word."""
    from lmms_eval.tasks import TaskManager

    own = TaskManager("ERROR", include_path=folder, include_defaults=False).task_index
    taken = own.keys() & set(tasks) & TaskManager("ERROR").task_index.keys()
    if taken:
        raise ValueError(f"lmms-eval has a task {sorted(taken)[0]} of its own; give the one in {folder} another name")


if __name__ == "__main__":
    main()
