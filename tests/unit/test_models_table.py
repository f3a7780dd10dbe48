"""docs/models.md says what the tests found and what the code does."""

from __future__ import annotations

from tests.support.families import FAMILIES
from tools.models_table import EXAMPLES, PAGE, exported, families, page, trained, vllm


def test_the_page_is_what_the_tool_writes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python tools/models_table.py"


def test_vllm_has_classes_for_what_people_train() -> None:
    assert vllm("llama") == "`LlamaForCausalLM`" and vllm("gemma3_text") == "`Gemma3ForCausalLM`, named to it"
    assert vllm("glm") == "by transformers' code" and vllm("mpt") == "no"


def test_nothing_failed() -> None:
    for family in families():
        for method in ("full", "lora", "qlora"):
            assert "FAILS" not in trained(family, method)
        assert "FAILS" not in exported(family)


def test_names_are_those_of_families() -> None:
    assert not set(EXAMPLES) - set(families())
    assert not set(FAMILIES) - set(families())
