"""Guessed languages: plain sentences, scripts, and what can't be told."""

from __future__ import annotations

import pytest

from rm_scale.batching.group_pairs import Pair
from rm_scale.data_review.languages import UNKNOWN, guess_language, review_languages
from rm_scale.data_review.sample import SampledGroup


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("English", "How do I bake bread, and what is the best flour for it?"),
        ("German", "Wie backe ich ein Brot, und welches Mehl ist das beste für den Teig?"),
        ("French", "Comment faire du pain, et quelle est la meilleure farine pour la pâte ?"),
        ("Spanish", "¿Cómo se hace el pan y cuál es la mejor harina para la masa?"),
        ("Portuguese", "Como fazer pão em casa, e qual é a melhor farinha para a massa do pão? Não sei."),
        ("Italian", "Come si fa il pane, e qual è la farina migliore per gli impasti della casa?"),
        ("Dutch", "Hoe bak ik een brood, en wat is het beste meel voor het deeg van deze cake?"),
        ("Polish", "Jak upiec chleb i czy to jest dobra mąka na ciasto? Nie wiem, co się stanie."),
        ("Turkish", "Ekmek nasıl yapılır ve bu hamur için en iyi un ne? Bir tarif var mı?"),
        ("Russian", "Как испечь хлеб, и какая мука лучше для теста? Я не знаю, что это."),
        ("Ukrainian", "Як спекти хліб, і яке борошно краще для тіста? Я не знаю, що це."),
        ("Chinese", "如何在家里做面包，用什么面粉最好？"),
        ("Japanese", "家でパンを作るにはどうすればいいですか。"),
        ("Korean", "집에서 빵을 어떻게 만드나요?"),
        ("Greek", "Πώς φτιάχνω ψωμί;"),
        ("Thai", "ทำขนมปังอย่างไร"),
        ("Arabic", "كيف أصنع الخبز في البيت من الدقيق؟ ما هو أفضل"),
        ("Hindi or Marathi", "रोटी कैसे बनाते हैं?"),
        (UNKNOWN, "x = [1, 2, 3]\nprint(x)"),
        (UNKNOWN, "Hi"),
        (UNKNOWN, "123 + 456 = ?"),
    ],
)
def test_languages(language: str, text: str) -> None:
    assert guess_language(text) == language


def group(prompt: str, better: str, worse: str, source: str = "a", subset: str = "") -> SampledGroup:
    return SampledGroup(source, 0, prompt, (better, worse), (Pair(0, 1),), 1, (5, 5), subset)


def test_mix_by_source_and_answers_in_another_language() -> None:
    english, german = "What is the best of it for you?", "Das ist nicht der Punkt, und es ist auch nicht gut."
    rows = [group(english, english, english)] * 30 + [group(german, german, english, "b", "chat")]
    rows.append(group("Hi", german, german, "b"))
    mix, finding = review_languages(rows)
    assert {(row["source"], row["subset"], row["language"]): row["num_groups"] for row in mix} == {
        ("a", "", "English"): 30,
        ("b", "chat", "German"): 1,
        ("b", "", "German"): 1,
    }
    assert (finding.count, finding.out_of, finding.level) == (1, 31, "note")
    assert finding.examples[0].texts["guessed"] == "prompt German, responses German, English"
