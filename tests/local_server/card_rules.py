"""The rules that the Hub is known to apply to a card's metadata before it accepts a commit: form, not truth."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import HFValidationError, validate_repo_id

# Type of each known key, from hub-docs/modelcard.md and docs/hub/model-cards in github.com/huggingface/hub-docs.
TEXTS = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation", "inference")
LISTS = ("tags", "metrics", "datasets")
REPOSITORIES = ("base_model", "datasets", "models")
RELATIONS = ("finetune", "adapter", "quantized", "merge")
SPACE_SDKS = ("gradio", "docker", "static")


def metadata_problems(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Check a README's metadata.

    Args:
        content: Text of the README.
        repo_type: Type of the repository: model, dataset or space.

    Returns:
        Errors, for which the Hub refuses the commit, and warnings.
    """
    match = REGEX_YAML_BLOCK.search(content)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match.group(2))
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    return (_space_errors(data) if repo_type == "space" else _model_errors(data)), []


def _model_errors(data: dict[str, Any]) -> list[str]:
    errors = [f'"{key}" must be a string' for key in TEXTS if key in data and not isinstance(data[key], str)]
    for key in LISTS:
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            errors.append(f'"{key}" must be a list of strings')
    for key in REPOSITORIES:
        names = data.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                errors.append(f'"{key}" with value {name!r} is not valid: {error}')
    if (relation := data.get("base_model_relation")) is not None and relation not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    if (index := data.get("model-index")) is not None:
        errors += _index_errors(index)
    return errors


def _index_errors(index: Any) -> list[str]:
    try:
        _, results = model_index_to_eval_results(index)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return [f'"model-index" is not valid: {type(error).__name__} {error}']
    return [
        f'"model-index": {result.metric_type} has no value' for result in results if result.metric_value in (None, "")
    ]


def _space_errors(data: dict[str, Any]) -> list[str]:
    errors = [f'"{key}" is required' for key in ("title", "sdk") if not isinstance(data.get(key), str)]
    if data.get("sdk") not in SPACE_SDKS:
        errors.append(f'"sdk" must be one of {", ".join(SPACE_SDKS)}')
    if len(str(data.get("short_description", ""))) > 60:
        errors.append('"short_description" must be at most 60 characters')
    return errors
