"""An answer's text comes in whole characters, never at or past a stop string, and the same however tokens arrive."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import small_tokenizers as small
from alora_serve.errors import InvalidRequestError
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.text import Decode, TextDelta, TextStream

BYTE_LEVEL = small.byte_level_tokenizer()
BYTE_FALLBACK = small.byte_fallback_tokenizer()
DECODE = {"byte_level": ChatTokenizer(BYTE_LEVEL).decode, "byte_fallback": ChatTokenizer(BYTE_FALLBACK).decode}
SIZE = {"byte_level": len(BYTE_LEVEL), "byte_fallback": len(BYTE_FALLBACK)}

random_tokens = st.integers(0, 10**6)
stop_strings = st.lists(st.text(alphabet="aeint \n�数", min_size=1, max_size=3), max_size=3)
emoji = st.lists(st.sampled_from(["👍🏽", "👨‍👩‍👧", "é", "数字", " the", "a", "\n", " ", "🏳️‍🌈"]), max_size=8).map(
    "".join
)


def streamed(decode: Decode, token_ids: Sequence[int], stop: Sequence[str], cuts: Sequence[int]) -> TextDelta:
    """The text of all deltas, tokens arriving in chunks that end at the cuts, until a stop string ends it."""
    stream = TextStream(decode, stop)
    borders = sorted({0, len(token_ids), *(cut % (len(token_ids) + 1) for cut in cuts)})
    text = ""
    for start, end in pairwise(borders):
        delta = stream.push(token_ids[start:end])
        text += delta.text
        if delta.stop_string is not None:
            return TextDelta(text, delta.stop_string)
    return TextDelta(text + stream.finish())


def final_text(decode: Decode, token_ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, str | None]:
    """The whole text, all tokens arriving at once, and the stop string that ended it."""
    delta = streamed(decode, token_ids, stop, cuts=())
    return delta.text, delta.stop_string


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Earliest position of a stop string and the longest that stands there."""
    found = [(text.index(string), -len(string), string) for string in stop if string in text]
    return (min(found)[0], min(found)[2]) if found else None


@pytest.mark.parametrize("name", DECODE)
@settings(max_examples=300)
@given(tokens=st.lists(random_tokens, max_size=40), stop=stop_strings, cuts=st.lists(st.integers(0, 99), max_size=5))
def test_chunks_make_no_difference(name: str, tokens: list[int], stop: list[str], cuts: list[int]) -> None:
    token_ids = [token % SIZE[name] for token in tokens]
    text, stop_string = final_text(DECODE[name], token_ids, stop)
    assert streamed(DECODE[name], token_ids, stop, cuts) == TextDelta(text, stop_string)


@settings(max_examples=500)
@given(tokens=st.lists(random_tokens, max_size=60), stop=stop_strings)
def test_byte_level_text_is_the_decoded_tokens_cut_at_the_first_stop_string(tokens: list[int], stop: list[str]) -> None:
    token_ids = [token % SIZE["byte_level"] for token in tokens]
    expected = TextDelta(DECODE["byte_level"](token_ids))
    for count in range(len(token_ids) + 1):
        # The last replacement character may still become a character.
        certain = DECODE["byte_level"](token_ids[:count])
        certain = certain if not certain.endswith("�") else certain[:-1]
        found = first_stop(certain, [string for string in stop if "�" not in string])
        if found is not None:
            expected = TextDelta(certain[: found[0]], found[1])
            break
    text, stop_string = final_text(DECODE["byte_level"], token_ids, stop)
    assert first_stop(text, stop) is None
    if not any("�" in string for string in stop):
        assert (text, stop_string) == (expected.text, expected.stop_string)


@settings(max_examples=300)
@given(tokens=st.lists(st.integers(150, 415), max_size=60))
def test_byte_fallback_text_is_the_decoded_tokens_where_the_bytes_are_whole(tokens: list[int]) -> None:
    decoded = DECODE["byte_fallback"](tokens)
    if "�" not in decoded:
        assert final_text(DECODE["byte_fallback"], tokens) == (decoded, None)


@pytest.mark.parametrize(("name", "tokenizer"), [("byte_level", BYTE_LEVEL), ("byte_fallback", BYTE_FALLBACK)])
@settings(max_examples=150)
@given(text=emoji)
def test_characters_of_several_tokens_come_whole(name: str, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(DECODE[name])
    deltas = [stream.push([token]).text for token in token_ids]
    assert stream.finish() == ""
    assert not any("�" in delta for delta in deltas)
    assert "".join(deltas) == DECODE[name](token_ids)


def test_the_real_model_streams_what_it_decodes(smollm2: PreTrainedTokenizerBase) -> None:
    decode = ChatTokenizer(smollm2).decode

    @settings(max_examples=200)
    @given(tokens=st.lists(st.one_of(st.integers(0, 49151), st.integers(0, 400)), max_size=60))
    def check(tokens: list[int]) -> None:
        assert final_text(decode, tokens) == (decode(tokens), None)

    check()


def characters(token_ids: Sequence[int]) -> str:
    """A decoder in which a token is a character, so that tests can spell out their tokens."""
    return "".join(map(chr, token_ids))


def push(stream: TextStream, text: str) -> TextDelta:
    return stream.push([ord(character) for character in text])


def test_text_that_may_begin_a_stop_string_waits() -> None:
    stream = TextStream(characters, ["\n\nUser:"])
    assert push(stream, "yes\n") == TextDelta("yes")
    assert push(stream, "\nUse") == TextDelta("")
    assert push(stream, "d") == TextDelta("\n\nUsed")
    assert push(stream, "\n\nUser") == TextDelta("")
    assert push(stream, ": no") == TextDelta("", "\n\nUser:")
    assert push(stream, "more") == TextDelta("")
    assert stream.finish() == ""


def test_text_that_waited_in_vain_comes_at_the_end() -> None:
    stream = TextStream(characters, ["abc"])
    assert push(stream, "xab") == TextDelta("x")
    assert stream.finish() == "ab"
    assert stream.finish() == ""


def test_a_long_stop_string_takes_as_much_memory_as_it_has_text() -> None:
    stop = "a" * 5000 + "b"
    tracemalloc.start()
    stream = TextStream(characters, [stop])
    assert push(stream, stop[1:-1] + "c") == TextDelta(stop[1:-1] + "c")
    assert push(stream, "a" * 100) == TextDelta("")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100 * len(stop)  # a set of its beginnings takes 12 MB


@pytest.mark.parametrize(
    ("stop", "chunk", "expected"),
    [
        (["bc", "c"], "abc", ("a", "bc")),  # one token completes both: the one that begins first
        (["c", "cd"], "abcd", ("ab", "c")),  # the first token that completes any
        (["bcd", "c"], "abcd", ("ab", "c")),
        (["aab"], "aaab", ("a", "aab")),
    ],
)
def test_the_first_token_that_completes_a_stop_string_decides(
    stop: list[str], chunk: str, expected: tuple[str, str]
) -> None:
    assert final_text(characters, [ord(character) for character in chunk], stop) == expected


class EvenLengths:
    """Lets a text end only where its length is even; keeps what it was told."""

    def __init__(self) -> None:
        self.told = ""

    def advance(self, text: str) -> None:
        self.told += text

    def may_end(self, text: str) -> bool:
        return len(self.told + text) % 2 == 0


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3))
def test_where_a_text_may_not_end_a_stop_string_is_text(text: str, stop: list[str]) -> None:
    gate = EvenLengths()
    stream = TextStream(characters, stop, gate)
    released, stopped = "", ""
    for character in text:
        delta = push(stream, character)
        released += delta.text
        assert gate.told == released or delta.stop_string is not None
        if delta.stop_string is not None:
            stopped = delta.stop_string
            break
    released += stream.finish()
    # As told: the first token after which one occurs, and of those the earliest place, of those there the longest.
    for end in range(len(text) + 1):
        found = [
            (place, -len(string), string)
            for string in stop
            for place in range(0, end, 2)
            if text[:end].startswith(string, place)
        ]
        if found:
            place, _, string = min(found)
            assert (released, stopped) == (text[:place], string)
            return
    assert (released, stopped) == (text, "")


def test_a_stop_string_is_found_though_one_inside_it_was_refused() -> None:
    class AfterOneSentence(EvenLengths):
        def may_end(self, text: str) -> bool:
            return self.told + text == "A."

    stream = TextStream(characters, ["\n\nQ:", "Q"], AfterOneSentence())
    assert push(stream, "A.\n\nQ") == TextDelta("A.")
    assert push(stream, ":") == TextDelta("", "\n\nQ:")


def test_of_stop_strings_in_one_token_the_earliest_and_longest_counts() -> None:
    def decode(token_ids: Sequence[int]) -> str:
        return "".join({0: "one ", 1: "two three four"}[token] for token in token_ids)

    assert final_text(decode, [0, 1], ["four", "three", "three f", "thr"]) == ("one two ", "three f")


def test_an_incomplete_character_waits_and_shows_at_the_end() -> None:
    first, *others = BYTE_LEVEL.encode("👍", add_special_tokens=False)
    stream = TextStream(DECODE["byte_level"])
    assert stream.push([first]) == TextDelta("")
    assert stream.push(others) == TextDelta("👍")
    assert stream.push([first]) == TextDelta("")
    assert stream.finish() == "�"


def test_what_stands_before_an_incomplete_character_does_not_wait() -> None:
    token = next(token for token, text in enumerate(map(BYTE_LEVEL.decode, range(400))) if text == " �")
    stream = TextStream(DECODE["byte_level"], ["\n"])
    assert stream.push([token]) == TextDelta(" ")
    assert stream.finish() == "�"
    assert final_text(DECODE["byte_level"], [token], [" "]) == ("", " ")


def test_a_stop_string_of_broken_characters_ends_the_text_too() -> None:
    first = BYTE_LEVEL.encode("a👍", add_special_tokens=False)[:2]
    assert final_text(DECODE["byte_level"], first, ["a�"]) == ("", None)


def test_special_tokens_add_nothing_and_break_no_character() -> None:
    thumb = BYTE_LEVEL.encode("👍", add_special_tokens=False)
    turn_end = BYTE_LEVEL.convert_tokens_to_ids("<|im_end|>")
    stream = TextStream(DECODE["byte_level"])
    assert stream.push([turn_end, *thumb[:2], *[turn_end] * 50, *thumb[2:], turn_end]) == TextDelta("👍")


def test_broken_bytes_come_out_after_a_bounded_wait() -> None:
    continuation = BYTE_LEVEL.convert_tokens_to_ids("¬")  # byte 0xAC, never the first of a character
    stream = TextStream(DECODE["byte_level"])
    text = "".join(stream.push([continuation]).text for _ in range(1000))
    assert len(text) >= 990
    assert text + stream.finish() == "�" * 1000


@settings(max_examples=500)
@given(characters_of_bytes=st.lists(st.sampled_from("ðŁĺĢ¬âA"), max_size=60))
def test_broken_bytes_between_characters_come_out_as_they_decode(characters_of_bytes: list[str]) -> None:
    tokens = BYTE_LEVEL.convert_tokens_to_ids(characters_of_bytes)  # byte-level names of F0 9F 98 80 AC E2 41
    assert final_text(DECODE["byte_level"], tokens) == (DECODE["byte_level"](tokens), None)


def test_a_broken_byte_does_not_take_back_what_was_given_out() -> None:
    euro = BYTE_FALLBACK.encode("a€", add_special_tokens=False)
    stream = TextStream(DECODE["byte_fallback"])
    assert stream.push(euro) == TextDelta("a€")
    assert stream.push([BYTE_FALLBACK.convert_tokens_to_ids("<0xE2>")]) == TextDelta("")
    assert stream.push([BYTE_FALLBACK.convert_tokens_to_ids("t")]) == TextDelta("�t")


@pytest.mark.parametrize("stop", [[], ["zzz"]])
def test_each_token_is_decoded_a_bounded_number_of_times(stop: list[str]) -> None:
    decoded = 0

    def counting(token_ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return DECODE["byte_level"](token_ids)

    tokens = [index * 7919 % SIZE["byte_level"] for index in range(4000)]
    final_text(counting, tokens, stop)
    assert decoded < 40 * len(tokens)


@settings(max_examples=200)
@given(
    tokens=st.lists(st.integers(0, 406), max_size=40),
    more=st.lists(st.integers(0, 406), max_size=20),
    stop=st.lists(st.text(alphabet="aeint \n", min_size=1, max_size=3), max_size=2),
)
def test_a_restored_stream_goes_on_where_the_first_one_stood(
    tokens: list[int], more: list[int], stop: list[str]
) -> None:
    first = TextStream(DECODE["byte_level"], stop)
    delivered = "".join(first.push([token]).text for token in tokens)
    second = TextStream(DECODE["byte_level"], stop)
    assert second.restore(tokens).text == delivered
    assert second.push(more) == first.push(more)
    assert second.finish() == first.finish()


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TextStream(characters, ["a", ""])
    assert caught.value.violations[0].field == "sampling.stop"
