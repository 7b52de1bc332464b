from __future__ import annotations

import pytest
from conversations import Exchange, conversation, exchanges

from word_renderer import WordRenderer


def test_exchanges_are_natural_text_and_differ_by_seed() -> None:
    first, second = exchanges(1, 80), exchanges(2, 80)

    assert first != second
    assert exchanges(1, 80) == first
    assert all(isinstance(found, Exchange) and len(found.user.content.split()) > 20 for found in first)
    with pytest.raises(ValueError, match="ask for fewer"):
        exchanges(1, 10_000)


@pytest.mark.parametrize("words", [40, 333, 2000])
def test_a_conversation_has_exactly_the_length_asked_for_and_is_talk(words: int) -> None:
    renderer = WordRenderer()

    messages = conversation(words, seed=1, count=renderer.prefix)

    assert len(renderer.prefix(messages)) == words
    assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    assert len(messages) > words // 200
    assert messages[-1].content.endswith("?")


def test_conversations_of_different_seeds_differ_from_their_first_words_on() -> None:
    renderer = WordRenderer()

    one, again, other = (renderer.prefix(conversation(300, seed=seed, count=renderer.prefix)) for seed in (1, 1, 2))

    assert one == again
    assert one[:4] != other[:4]


@pytest.mark.parametrize("words", [3, 100_000])
def test_a_length_that_no_conversation_has_is_refused(words: int) -> None:
    with pytest.raises(ValueError, match=f"{words} tokens"):
        conversation(words, seed=1, count=WordRenderer().prefix)
