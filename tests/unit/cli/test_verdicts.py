from __future__ import annotations

import pytest

from alora_serve.cli.verdicts import Verdict


@pytest.mark.parametrize(
    ("value", "likelihood", "shown"),
    [
        (
            {"likelihood": 0.0052201, "spans": [{"begin": 3, "weight": 0.98765}]},
            0.0052201,
            '{"likelihood": 0.005, "spans": [{"begin": 3, "weight": 0.988}]}',
        ),
        ({"answerability_likelihood": 0.25}, 0.25, '{"answerability_likelihood": 0.25}'),
        ({"certainty": 1, "because": "it says so"}, 1.0, '{"certainty": 1, "because": "it says so"}'),
        ({"rewritten_question": "Où?"}, None, '{"rewritten_question": "Où?"}'),
        ({"one": 0.5, "two": 0.5}, None, '{"one": 0.5, "two": 0.5}'),
        ({"flag": True}, None, '{"flag": true}'),
        ([0.5], None, "[0.5]"),
        ("yes", 1.0, "yes"),
        ("no", 0.0, "no"),
        ("Who knows?", None, "Who knows?"),
    ],
)
def test_a_result_has_a_likelihood_where_it_is_one(value: object, likelihood: float | None, shown: str) -> None:
    verdict = Verdict("name", value)
    assert (verdict.likelihood, verdict.shown) == (likelihood, shown)
