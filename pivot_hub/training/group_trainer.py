"""Base of our GRPO and RLOO trainers: a prompt's answers share one prefix, and a killed run resumes as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    add_fused_lm_head,
    disable_dropout_in_model,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import TrainingError
from pivot_hub.mllm.families import FAMILIES
from pivot_hub.mllm.inputs import KINDS_OF_TOKENS, PositionsOf, positions_of
from pivot_hub.training.group_generation import one_prefill
from pivot_hub.training.group_layout import group_trees, images_of_sequences
from pivot_hub.training.group_sampler import GroupSampler
from pivot_hub.training.part_trainer import PartTrainer
from pivot_hub.training.reward_guards import RewardGuards
from pivot_hub.training.samples import Samples
from pivot_hub.training.tree_check import language_attention, tree_problem
from pivot_hub.training.tree_layout import use_trees

logger = logging.getLogger(__name__)


class GroupTrainer(PartTrainer):
    """What our GRPO and RLOO trainers add to TRL's. Put it before a TRL trainer in the bases.

    Losses and metrics are TRL's. Log-probabilities of policy, old policy and reference are computed with the answers of
    a prompt as the branches of one tree, and transformers generates them from one prefill, so that image and prompt run
    once for all of them. A prompt's answers stay together, where TRL shuffles the answers of a generation batch. What
    is generated is a function of seed, step and process, and answers that were generated but not yet trained on are
    part of a checkpoint.

    The config is TRL's with the options of `grpo.GroupOptions`: share_prefix; stop_without_signal, the number of steps
    after which a run stops if the answers of every prompt got the same reward; and samples_every, the steps between two
    samples of `samples.html`.

    Attributes:
        guards: Warnings about the run's rewards.
        samples: Samples of the run, beside its checkpoints.

    Args:
        model: The policy. The reference, where beta is not 0, is a copy of it.
        args: Config of the trainer.
        rates: Learning rate of each part of the MLLM (vision, projector, language). None trains every part at
            `args.learning_rate`.
        options: Further arguments of TRL's trainer.

    Raises:
        TrainingError: An option cannot be used here; the message names it.
    """

    # What the methods below read of TRL's trainers.
    args: Any
    model: Any
    train_dataset: Any
    beta: float
    num_generations: Any
    num_generations_eval: Any
    generation_config: Any
    use_vllm: bool
    use_transformers_continuous_batching: bool
    num_iterations: int
    temperature: float
    shuffle_dataset: Any
    reward_weights: torch.Tensor
    reward_funcs: list[Any]
    reward_func_names: list[str]
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _tokenizer: Any
    _logs: Any
    _metrics: Any
    _step: int
    _buffered_inputs: Any
    _generate_and_score_completions: Any

    def __init__(self, model: Any, *, args: Any, rates: dict[str, float] | None = None, **options: Any) -> None:
        if args.sync_ref_model:
            raise TrainingError(
                "sync_ref_model changes the reference as it trains, and checkpoints do not hold the reference; leave "
                "sync_ref_model out."
            )
        beta, reference = args.beta, None
        if beta and isinstance(model, PreTrainedModel) and options.get("peft_config") is None:
            # TRL would load the reference by the model's Hub name, but a model that was loaded from a folder or built
            # from a config has none.
            reference = deepcopy(model).eval().requires_grad_(False)
            args.beta = 0.0
        try:
            super().__init__(model=model, args=args, **options)
        finally:
            args.beta = beta
        self.rates = rates
        if not self.use_vllm and "use_cache" not in (args.generation_kwargs or {}):
            self.generation_config.use_cache = True  # the config of a trained model can say that it has no cache
        self._answers_at_once = 1  # answers that generation draws behind one prompt
        # TRL then logs as frac_reward_zero_std whether a whole batch got one reward, and not the share of prompts.
        self._spread_is_of_batch = (
            getattr(args, "scale_rewards", "group") == "batch"
            or getattr(args, "multi_objective_aggregation", "sum_then_normalize") == "normalize_then_sum"
        )
        self._share_without_signal = 0.0  # of the prompts of the last generation batch, whose answers got one reward
        self._last_signal: int | None = None  # last step at which the rewards of a prompt's answers differed
        self._tokenizer.padding_side = "left"  # TRL joins the kinds of tokens of the prompts to its own left padding
        policy: PreTrainedModel = self.model
        self._positions: PositionsOf | None = None
        if args.share_prefix:
            if (problem := self._problem_of_trees(policy, reference)) is None:
                self._positions = positions_of(policy)
            else:
                logger.warning("share_prefix is off: %s.", problem)
        if reference is not None:
            self.beta, self.ref_model = beta, self._prepared(reference)
        names, weights = self.reward_func_names, args.reward_weights or [1.0] * len(self.reward_funcs)
        form = [n for n, reward in zip(names, self.reward_funcs, strict=True) if getattr(reward, "of_form", False)]
        self.guards = RewardGuards(names, form, weights, args.max_completion_length)
        self.samples = Samples(Path(args.output_dir), args.samples_every, names, weights, self.guards.warnings)
        self.add_callback(self.guards)  # before the page, which shows its warnings
        self.add_callback(self.samples)

    def _problem_of_trees(self, policy: PreTrainedModel, reference: PreTrainedModel | None) -> str | None:
        """Return why the answers of a prompt cannot share it, or None if they can."""
        if is_peft_model(policy):
            return "PEFT wraps the model inside which it works"
        if policy.config.model_type not in FAMILIES:
            return f"{type(policy).__name__} is not an MLLM of pivot_hub's table"
        if not isinstance(self.processing_class, ProcessorMixin):
            return "processing_class is not a processor of images and text"
        if getattr(self, "tools", None):
            return "tools can add images to answers"
        if self.args.use_liger_kernel:
            return "use_liger_kernel replaces the layers that it runs"
        if self.aux_loss_enabled:
            return (
                f"the loss that balances the experts, weighted by {self.router_aux_loss_coef}, is over all tokens of a "
                "batch, and prompts would count once; router_aux_loss_coef=0 turns it off"
            )
        if (attention := language_attention(policy)) != "sdpa":
            return f"it is for sdpa attention, not {attention}"
        for each in (policy, reference):
            if each is not None:
                use_trees(each)
        return tree_problem(policy, self.processing_class, None)

    def _prepared(self, reference: PreTrainedModel) -> Any:
        """Return the reference as TRL prepares the one that it loads."""
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        cast_head = getattr(self.args, "cast_lm_head_to_fp32", False)
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=cast_head)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.shuffle_dataset:
            return super(PartTrainer, self)._get_train_sampler(dataset)
        blocks = np.arange(len(dataset)) if self.blocks is None else self.blocks
        return GroupSampler(
            BlockSampler(blocks, self.args.seed),
            self.args.generation_batch_size // self.num_generations,
            self.num_generations,
            self._batches_per_generation,
        )

    @property
    def _batches_per_generation(self) -> int:
        """Number of batches, repeated iterations included, that are trained on before answers are generated again."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the next batch to train on, after generating answers if none are left.

        Args:
            generation_batch: Rows of a generation batch, each once for each of its answers.
        """
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % self._batches_per_generation == 0 or self._buffered_inputs is None:
            with self._seeded():
                generated = self._generate_and_score_completions(generation_batch)
            if self._spread_is_of_batch:
                self._metrics["train"]["frac_reward_zero_std"][-1] = self._share_without_signal
            self._sample(generation_batch)
            if "row" in generation_batch[0]:
                generated["row"] = [example["row"] for example in generation_batch]
            divided: Any = split_pixel_values_by_grid(generated)
            batches: list[Any] = split_tensor_dict(divided, self.args.steps_per_generation)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(batch) for batch in batches]
        return dict(self._buffered_inputs[self._step % self.args.steps_per_generation])

    def _sample(self, rows: list[dict[str, Any]]) -> None:
        """Keep answers that were just generated as a sample of the run, if one is due.

        Args:
            rows: Rows of this process, each once for each of its answers. The answers, which TRL has gathered for its
                own logs, begin with those of the main process.
        """
        step = self.state.global_step + 1
        if not self.samples.is_due(step):
            return
        logs, first = self._logs, rows[:: self.num_generations]
        generated, kept = len(rows) * self.accelerator.num_processes, len(first) * self.num_generations
        part = slice(-generated, None)  # the last ones are those of this batch
        rewards = {name: list(logs["rewards"][name])[part][:kept] for name in self.reward_func_names}
        completions, advantages = (list(logs[name])[part][:kept] for name in ("completion", "advantages"))
        self.samples.add(step, first, completions, rewards, advantages)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Return ids and images of each prompt, and what generation takes of the images: once for each group's."""
        trl: Any = super()
        answers = self._answers_at_once = self._answers_of_groups(prompts)
        ids, images, fields = trl._tokenize_prompts(prompts[::answers])
        repeated = [[each for each in values or [] for _ in range(answers)] for values in (ids, images)]
        return repeated[0], None if images is None else repeated[1], fields

    def _answers_of_groups(self, prompts: list[Any]) -> int:
        """Return the number of answers that each prompt has in turn, or 1 if generation cannot share prompts."""
        answers: int = self.num_generations if self.model.training else self.num_generations_eval
        is_plain = not (
            self.use_vllm
            or self.use_transformers_continuous_batching
            or self.args.cache_implementation
            or self.args.generation_kwargs
        )
        if self._positions is None or not is_plain or len(prompts) % answers:
            return 1
        return answers if all(prompt == prompts[i - i % answers] for i, prompt in enumerate(prompts)) else 1

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        trl: Any = super()
        if (answers := self._answers_at_once) == 1:
            return trl._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        images = None if images is None else images[::answers]
        self.generation_config.num_return_sequences = answers
        try:
            with one_prefill(self.accelerator.unwrap_model(self.model), answers):
                return trl._generate_single_turn(prompt_ids[::answers], images, multimodal_fields, *args, **kwargs)
        finally:
            self.generation_config.num_return_sequences = 1

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Draw from random numbers of this step and process, and leave the trainer's own as they are."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            entropy = [self.args.seed, self._step, self.accelerator.process_index]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
            yield

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        """Return TRL's rewards, (answers of all processes, functions).

        Raises:
            TrainingError: For `stop_without_signal` steps no prompt had answers with different rewards.
        """
        trl: Any = super()
        rewards = trl._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self.model.training:
            return rewards
        step = self.state.global_step
        groups = (rewards.nan_to_num() * self.reward_weights.to(rewards.device)).sum(1).view(-1, self.num_generations)
        self._share_without_signal = float((groups == groups[:, :1]).all(1).float().mean())
        if self._last_signal is None or self._share_without_signal < 1:
            self._last_signal = step
        steps = self.args.stop_without_signal
        if steps and step - self._last_signal >= steps:
            raise TrainingError(
                f"the {self.num_generations} answers of every prompt got the same reward for {steps} steps, the last "
                f"one {float(groups[0, 0]):g}, so that nothing is learned; check the rewards, raise "
                "`args.temperature` or `args.num_generations`, take rows that the model solves sometimes, or set "
                "`args.stop_without_signal` to 0."
            )
        return rewards

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> Any:
        """Return log-probability and entropy of each token of B answers, (B, logits_to_keep) each, and no third value.

        The arguments are those of TRL's method, whose values these are.
        """
        multimodal.pop("batch_num_images", None)  # LLaVA-OneVision's, which TRL does not know; one is its default
        if self._positions is None:
            trl: Any = super()
            return trl._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        count = len(input_ids)
        kinds = {name: multimodal.pop(name) for name in KINDS_OF_TOKENS if multimodal.get(name) is not None}
        num_images, num_tiles = multimodal.pop("num_images", None), multimodal.pop("num_tiles", None)
        images = images_of_sequences(count, num_images, num_tiles, multimodal)
        logps, entropies = [], []
        size = batch_size or count
        for start in range(0, count, size):
            part = slice(start, start + size)
            inputs = group_trees(
                input_ids[part],
                attention_mask[part],
                logits_to_keep,
                self._positions,
                {name: values[part] for name, values in kinds.items()},
                images[part],
            )
            with self.accelerator.autocast():
                outputs = model(**inputs, fused_lm_head=True)
            logps.append(outputs.log_probs)
            entropies.append(outputs.entropy)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        is_used_up = self._step % self._batches_per_generation == 0
        generated = {"step": self._step, "batches": None if is_used_up else self._buffered_inputs}
        # Before the other files: the last one that a trainer writes marks a whole checkpoint.
        torch.save(generated, self._generated_file(folder))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (file := self._generated_file(Path(checkpoint))).is_file():
            generated = torch.load(file, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = generated["step"], generated["batches"]

    def _generated_file(self, checkpoint: Path) -> Path:
        """Return the file of a checkpoint with the answers that this process has generated and not trained on."""
        return checkpoint / f"generated_{self.accelerator.process_index}.pt"
