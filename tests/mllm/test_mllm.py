"""MLLMs: every encoder and language model in LLaVA's classes, with features of the paper's layer."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from pivot_hub import PivotVisionModel
from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.build import build_mllm, read_processor
from pivot_hub.mllm.chat_templates import GEMMA, LLAMA3, QWEN, ChatFormat
from pivot_hub.mllm.load import load_llava, load_mllm
from pivot_hub.mllm.published_configs import part_config
from pivot_hub.mllm.trainable import freeze_parts, parameter_groups, parts_of
from pivot_hub.training.stage import run_stage
from tests.conftest import make_language
from tests.encoder.originals import IMAGE_PX, ORIGINALS, make_vision
from tests.training.test_conversation import processor_of

PATCHES = (IMAGE_PX // 8) ** 2
MESSAGES: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("kind", ORIGINALS)
def test_patch_tokens_enter_at_the_feature_layer_without_cls(kind: str, parts: Path, tmp_path: Path) -> None:
    vision = make_vision(tmp_path / kind, kind)
    processor: Any
    model, processor = build_mllm(str(vision), str(parts / "language"))
    model.eval()
    prefix = ORIGINALS[kind].prefix_tokens
    registers = max(prefix - 1, 0)  # LLaVA's classes drop CLS only
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (50, 40), "red")], return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == PATCHES + registers

    entered = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        model(**batch)
        tower = model.model.vision_tower
        hidden = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        alone = PivotVisionModel.from_mllm(model)(batch["pixel_values"]).last_hidden_state
    assert hidden[-2].shape[1] == PATCHES + prefix
    assert torch.equal(entered[0], hidden[-2][:, min(prefix, 1) :])
    assert torch.equal(alone, entered[0][:, registers:])


def test_projector_is_two_layers_with_gelu(parts: Path) -> None:
    model, _ = build_mllm(str(parts / "vision"), str(parts / "language"))
    projector = model.model.multi_modal_projector
    assert (projector.linear_1.in_features, projector.linear_2.out_features) == (32, 32)
    assert type(projector.act).__name__ == "GELUActivation"


def test_seed_decides_the_projector_and_nothing_else(parts: Path) -> None:
    built = [build_mllm(str(parts / "vision"), str(parts / "language"), seed=s)[0] for s in (0, 0, 1)]
    states = [m.state_dict() for m in built]
    differ = {k for k in states[0] if not torch.equal(states[0][k], states[2][k])}
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert differ
    assert all("multi_modal_projector" in k for k in differ)


def test_chat_template_is_qwens_with_the_image_in_front(parts: Path) -> None:
    _, processor = build_mllm(str(parts / "vision"), str(parts / "language"))
    messages: list[Any] = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "A star."}]}]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{QWEN.image_token}\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA star.<|im_end|>\n"
    )


def test_a_tokenizer_without_the_tokens_gets_them(parts: Path, tmp_path: Path) -> None:
    """LLaMA-like language models have neither the image token nor Qwen's turn tokens, so the embedding grows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = bpe.get_vocab_size()
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="!", bos_token="#").save_pretrained(tmp_path)
    model, processor = build_mllm(str(parts / "vision"), str(tmp_path))
    assert len(processor.tokenizer) == size + 3
    assert model.get_input_embeddings().num_embeddings == size + 3 == model.lm_head.out_features
    assert len(processor.tokenizer(QWEN.image_token, add_special_tokens=False)["input_ids"]) == 1


def test_groups_hold_each_trained_parameter_once_at_its_learning_rate(parts: Path) -> None:
    model, _ = build_mllm(str(parts / "vision"), str(parts / "language"))
    rates = {"vision": 1e-5, "projector": 1e-3}
    freeze_parts(model, rates)
    decayed = {n for n, p in model.named_parameters() if p.ndim > 1}
    groups = parameter_groups(model, rates, 0.1, decayed)
    grouped = [id(p) for g in groups for p in g["params"]]
    expected = [id(p) for part in rates for p in parts_of(model)[part].values() if p.requires_grad]
    assert sorted(grouped) == sorted(expected)
    assert len(set(grouped)) == len(grouped)
    assert {(g["part"], g["lr"], g["weight_decay"]) for g in groups} == {
        ("vision", 1e-5, 0.1),
        ("vision", 1e-5, 0.0),
        ("projector", 1e-3, 0.1),
        ("projector", 1e-3, 0.0),
    }
    assert not any(p.requires_grad for p in parts_of(model)["language"].values())


def test_saved_mllm_loads_equal(parts: Path, tmp_path: Path) -> None:
    model, processor = build_mllm(str(parts / "vision"), str(parts / "language"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load_llava(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert loaded_processor.chat_template == processor.chat_template
    assert loaded_processor.num_additional_image_tokens == 0


def test_missing_weights_are_never_replaced_by_random_ones(parts: Path, tmp_path: Path) -> None:
    vision = make_vision(tmp_path / "v")
    weights = load_file(vision / "model.safetensors")
    weights.pop(next(k for k in weights if "fc1.weight" in k))
    save_file(weights, vision / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        build_mllm(str(vision), str(parts / "language"))


def test_sizes_that_do_not_fit_the_weights_are_refused(parts: Path, tmp_path: Path) -> None:
    vision = make_vision(tmp_path / "v")
    config = json.loads((vision / "config.json").read_text())
    (vision / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError, match="the weights do not have the sizes of"):
        build_mllm(str(vision), str(parts / "language"))


def test_unknown_parts_are_named(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-encoder"):
        build_mllm(str(tmp_path / "no-such-encoder"), str(parts / "language"))
    with pytest.raises(CheckpointError, match="is not supported; give one of"):
        build_mllm(str(make_language(tmp_path / "language")), str(parts / "language"))
    with pytest.raises(CheckpointError, match="no MLLM of the table"):
        load_mllm(parts / "vision")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_mllm(tmp_path)


def make_other_language(folder: Path, chat: ChatFormat) -> Path:
    """Save a small random language model of a chat format's family, with a tokenizer of single characters."""
    tokenizer: Any = processor_of(chat).tokenizer
    config_classes: dict[str, Any] = {LLAMA3.turn_end: LlamaConfig, GEMMA.turn_end: Gemma2Config}
    config = config_classes[chat.turn_end](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [LLAMA3, GEMMA], ids=["llama3", "gemma2"])
def test_other_language_models_use_their_own_format_and_train(
    chat: ChatFormat, own_recipes: Path, tmp_path: Path, parts: Path
) -> None:
    language = make_other_language(own_recipes / "other-language", chat)
    processor: Any
    model, processor = build_mllm(str(parts / "vision"), str(language))
    assert processor.image_token == chat.image_token
    assert model.lm_head.out_features == len(processor.tokenizer)  # the vocabulary had all tokens of the format
    end = processor.tokenizer.convert_tokens_to_ids(chat.turn_end)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == end
    overrides = [f"model.language={language}"]
    for stage in ("1-align", "2-instruct"):
        folder = run_stage(load_recipe(own_recipes / f"{stage}.yaml", overrides), tmp_path, log=lambda line: None)
    loaded, loaded_processor = load_mllm(folder)
    assert loaded_processor.chat_template == chat.template
    assert type(loaded.model.language_model).__name__ == f"{'Llama' if chat is LLAMA3 else 'Gemma2'}Model"


def test_a_processor_needs_no_weights(parts: Path, tmp_path: Path) -> None:
    """`pivot data check` counts tokens with the processor that training uses, so that training reuses its index."""
    from pivot_hub.training.row_check import RowCheck

    _, built = build_mllm(str(parts / "vision"), str(parts / "language"))
    for part in ("vision", "language"):
        shutil.copytree(parts / part, tmp_path / part)
        (tmp_path / part / "model.safetensors").unlink()
    without_weights = read_processor(str(tmp_path / "vision"), str(tmp_path / "language"))
    checks = [RowCheck(processor, 64, "conversation", pairs=False).to_dict() for processor in (built, without_weights)]
    assert checks[0] == checks[1]
    (tmp_path / "vision" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json"):
        read_processor(str(tmp_path / "vision"), str(tmp_path / "language"))


@pytest.mark.parametrize("trained", [{"projector": 1e-3}, {"vision": 1e-4, "projector": 1e-3}])
def test_a_frozen_tower_runs_nothing_backward_under_checkpointing(trained: dict[str, float], parts: Path) -> None:
    model, processor = build_mllm(str(parts / "vision"), str(parts / "language"))
    freeze_parts(model, trained)
    model.gradient_checkpointing_enable()
    model.train()
    entered: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (50, 40), "red")], return_tensors="pt")
    model(**batch).logits.sum().backward()
    assert entered[0].requires_grad == ("vision" in trained)
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


def _changed(folder: Path, target: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(folder, target))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_a_strangers_code_is_neither_run_nor_asked_about(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked whether to run code"))
    code = {
        "model_type": "own",
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "own.Own"),
    }
    language = _changed(parts / "language", tmp_path / "language", **code)
    (language / "own.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"language: cannot be loaded: .*custom code"):
        build_mllm(str(parts / "vision"), str(language))
    with pytest.raises(CheckpointError, match="its config cannot be read"):
        load_mllm(language)
    with pytest.raises(CheckpointError, match="its config cannot be read"):
        part_config(str(language))
    tokenizer = Path(shutil.copytree(parts / "language", tmp_path / "tokenizer"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copyfile(language / "own.py", tokenizer / "own.py")
    with suppress(CheckpointError):  # transformers may take the tokenizer of the model type instead
        build_mllm(str(parts / "vision"), str(tokenizer))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_an_mllm_or_a_language_model_are_refused(parts: Path, tmp_path: Path) -> None:
    model, processor = build_mllm(str(parts / "vision"), str(parts / "language"))
    model.save_pretrained(tmp_path / "mllm")
    processor.save_pretrained(tmp_path / "mllm")
    language = Path(shutil.copytree(parts / "language", tmp_path / "language"))
    for folder in (tmp_path / "mllm", language):
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"are a pickle \(pytorch_model.bin\), which may run code"):
        load_mllm(tmp_path / "mllm")
    with pytest.raises(CheckpointError, match=r"are a pickle \(pytorch_model.bin\), which may run code"):
        build_mllm(str(parts / "vision"), str(language))


def test_mllms_are_named_where_an_encoder_or_llava_is_needed(parts: Path, tmp_path: Path) -> None:
    model, _ = build_mllm(str(parts / "vision"), str(parts / "language"))
    model.save_pretrained(tmp_path / "mllm")
    with pytest.raises(CheckpointError, match=r"is an MLLM \(llava\), not an encoder; take .*`pivot extract "):
        build_mllm(str(tmp_path / "mllm"), str(parts / "language"))
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(CheckpointError, match=r"holds a gemma3 model, an MLLM, but not of LLaVA's.*`pivot extract "):
        load_llava(tmp_path / "gemma")
    for layers in ([-2, -1], -5):
        folder = _changed(tmp_path / "mllm", tmp_path / str(layers), vision_feature_layer=layers)
        with pytest.raises(CheckpointError, match=r"features of several layers|the encoder has 3 layers; give -4 to 3"):
            load_mllm(folder)
    with pytest.raises(CheckpointError, match="feature layer 9: the encoder has 3 layers"):
        build_mllm(str(parts / "vision"), str(parts / "language"), feature_layer=9)
