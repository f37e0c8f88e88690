"""How many tokens an image takes in an MLLM, counted from the image's size alone."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.inputs import placeholder_of, process

# Height and width of images, in pixels, on which a processor's own counts are compared with what it prepares.
TRIALS = ((32, 32), (480, 640), (1000, 300))


class ImageTokens:
    """Counts the tokens that a processor writes for an image, by the image's size.

    A row's text has one token in the place of its image. For most families, transformers' processors compute from a
    size how many tokens replace it. Some cannot, and some leave out the markers around an image. Of these, a black
    image of each size is prepared once, whose tokens are counted.

    Args:
        processor: Processor of the MLLM.

    Attributes:
        placeholder: Text that stands for an image in a prompt.
        computes: Whether the processor's own counts are right, and are used.

    Raises:
        CheckpointError: The processor has no chat template.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor: Any = processor
        self.placeholder = placeholder_of(processor)
        if processor.chat_template is None:
            raise CheckpointError(
                "the MLLM's processor has no chat template, which makes a text of a conversation; give an MLLM that "
                "was trained on conversations."
            )
        turns: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
        self._question = str(self.processor.apply_chat_template(turns, tokenize=False))
        self._question_tokens = len(self.processor.tokenizer(self._question, add_special_tokens=False)["input_ids"])
        self._known: dict[tuple[int, int], int] = {}
        self.computes = self._computes()

    def count(self, height: int, width: int) -> int:
        """Return the number of tokens of an image.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Raises:
            ValueError: The processor refuses images of this shape.
        """
        size = (height, width)
        if size not in self._known:
            self._known[size] = self._computed(*size) if self.computes else self._prepared(*size)
        return self._known[size]

    def settings(self) -> str:
        """Return all that the counts depend on, as JSON."""
        processors = (self.processor, self.processor.image_processor)
        return json.dumps([json.loads(each.to_json_string()) for each in processors], sort_keys=True)

    def _computes(self) -> bool:
        """Return whether the processor computes the counts of images that it prepares."""
        try:
            computed = [self._computed(*size) for size in TRIALS]
        except Exception:  # what it lacks for it may be the method, or any setting of an image processor
            return False
        return computed == [self._prepared(*size) for size in TRIALS]

    def _computed(self, height: int, width: int) -> int:
        return int(self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0])

    def _prepared(self, height: int, width: int) -> int:
        whole = process(self.processor, self._question, [Image.new("RGB", (width, height))])
        return len(whole.ids) - self._question_tokens + 1
