"""Many texts get the ids that the tokenizer's own call gives them, whatever its backend was set to before."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rm_scale.data.batch_tokenizer import BatchTokenizer
from tests.unit.data.test_shared_prefix import CUT, WHOLE

TEXTS = [f"{'The quick brown fox. ' * (n % 7)}é {n} <|im_end|> don't" for n in range(100)] + ["", " ", "</s>"]


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
@pytest.mark.parametrize("adds", [True, False])
def test_ids_are_those_of_the_tokenizers_own_call(name: str, adds: bool) -> None:
    tokenizer = {**CUT, **WHOLE}[name]
    expected = tokenizer(TEXTS, add_special_tokens=adds)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert BatchTokenizer(tokenizer, add_special_tokens=True).ids(TEXTS, adds) == expected


def test_a_tokenizer_with_a_way_of_its_own_gets_every_text() -> None:
    class Own(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *given: Any, **more: Any) -> Any:
            return super().__call__([one.lower() for one in text], *given, **more)

    own = Own(tokenizer_object=CUT["gpt2"].backend_tokenizer, eos_token="</s>")
    found = BatchTokenizer(own, add_special_tokens=True).ids(TEXTS, add_special_tokens=True)
    assert found == CUT["gpt2"]([text.lower() for text in TEXTS])["input_ids"]
