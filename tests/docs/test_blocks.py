"""Every block of code on the site: it is run by a test or says why not, and it parses."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from docs.generate.links import ROOT
from pivot_hub.config.recipe import Recipe, load_recipe
from tests.command_lines import parse, pivot_arguments
from tests.docs.blocks import SHOWN, WRITTEN, Block, all_blocks

BLOCKS = all_blocks()
NOT_RUN = [block for block in BLOCKS if block.reason]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def test_every_block_has_a_language_that_is_checked() -> None:
    assert len(BLOCKS) > 60
    known = (*SHOWN, "python", "bash", "yaml", "diff", "js")
    assert [str(block) for block in BLOCKS if block.language not in known] == []


def test_the_pages_that_are_left_out_have_a_test() -> None:
    assert [test for test in WRITTEN.values() if not (ROOT / test).is_file()] == []


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_is_not_run_says_what_it_needs_and_names_what_is_tested(block: Block) -> None:
    assert block.reason is not None
    assert re.match(r"needs [\w\d]", block.reason), block.reason
    for name in re.findall(r"`(tests/[^`]+)`", block.reason):
        file, _, test = name.partition("::")
        assert (ROOT / file).is_file(), name
        assert not test or f"def {test}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_commands_take_their_arguments(block: Block) -> None:
    for arguments in pivot_arguments(block.text):
        parse(arguments)


def test_an_unknown_option_is_noticed() -> None:
    (arguments,) = pivot_arguments("find . | pivot encode - --encoder E --out f  # a comment")
    parse(arguments)
    with pytest.raises(Exception, match="No such option: --sore"):
        parse(pivot_arguments("accelerate launch --x y -m pivot_hub encode a --sore int8")[0])
    with pytest.raises(ValueError, match="there is no command"):
        parse(["encod"])


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_recipes_follow_the_schema(block: Block, tmp_path: Path) -> None:
    values = yaml.safe_load(re.sub(r": !function (\S+)", r": \1", block.text))
    if "stage" not in values:
        assert "task" in values  # lmms-eval's, which tests/conformance/test_lmms.py runs
        return
    if "parent" in values:
        Recipe.model_validate(values)
        return
    (tmp_path / "recipe.yaml").write_text(block.text)
    assert load_recipe(tmp_path / "recipe.yaml").recipe.stage == values["stage"]


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize("block", of("diff"), ids=str)
def test_both_sides_of_a_diff_compile(block: Block) -> None:
    for side in "-+":
        ast.parse("\n".join(line[2:] for line in block.text.splitlines() if line[:1] in (" ", side)))


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_read(block: Block) -> None:
    json.loads(block.text)
