"""Grammars in EBNF, as vLLM's clients send them, mean what they mean there."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_serve.model.structure.ebnf import is_ebnf
from alora_serve.types import Grammar
from held_forms import holds, refusal

SQL = """
root ::= select_statement

select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# at most so much white space
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "y", "yesno"]),
        ('root ::= "a"\n  | "b" # or\n  # even\n  | "c"', ["a", "b", "c"], ["", "ab"]),
        ('root::="(" root ")"|item\nitem::=[xy]{1,2}', ["x", "((xy))"], ["(x", "()", "xyx"]),
        (SQL, ["SELECT col_1  from table_2  where col_1 = 1 "], ["SELECT col_1 from table_2", "select"]),
        (JSON, ["{}", '{"a": [1,-2.5e3, "\\n\\u00e9"]}\n  '], ["[]", "{", '{"a"}', '{"a": [1,]}', '{"a": "\n"}']),
        ('root ::= (| "a") ( "b" | ) ws "."\nws ::= | " " ws', [".", "a.", "b  .", "ab."], ["", "ba."]),
        ('root ::= "a"? "b"{2} "c"{1,2} "d"{2,} "e"+ "f"*', ["bbcdde", "abbccdddeff"], ["abcdde", "bbcccdde", "bbcde"]),
        (r'root ::= "\x41\u0042C\U0001F600\"\\\n\t\r/\'"', ["ABC😀\"\\\n\t\r/'"], ["ABC"]),
        (r"root ::= [^\]\[\\^a-c-]", ["d", '"', "\n", "é"], ["", "]", "[", "\\", "^", "a", "b", "-"]),
        (r"root ::= [a&&b] [--/] [~~[] [a-c-e]", ["&-~-", "b.[b", "a/~e"], ["ca~a", "a0~a", "a-aa", "a-~d"]),
        (r"root ::= [\u4e00-\u9fff\U0001F600-\U0001F640]", ["数", "😀"], ["a", "é"]),
        ("root ::= . .", ["a\n", "é😀"], ["a", "abc"]),
        ("root ::= start true\nstart ::= A-b\nA-b ::= [x]\nA_b ::= [y]\ntrue ::= A_b", ["xy"], ["xx", "yy", "x"]),
        ('root ::= ""', [""], ["a"]),
        ("root ::=", [""], ["a"]),
        ('root ::= "a"\nunused ::= root "b" unused', ["a"], ["ab", ""]),
    ],
)
def test_a_grammar_in_ebnf_is_held_to(grammar: str, good: list[str], bad: list[str]) -> None:
    form = Grammar(grammar)
    assert [text for text in good if not holds(form, text)] == []
    assert [text for text in bad if holds(form, text)] == []


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ('start ::= "a"', "as EBNF: there is no rule 'root'"),
        ('root ::= "a" b', "as EBNF: there is no rule 'b', which 'root' names"),
        ('root ::= "a"\nroot ::= "b"', "as EBNF: there are two rules 'root'"),
        ('root ::= "a"\nb ::= "c" & "d"', "as EBNF: line 2: cannot read '& \"d\"'"),
        ('"a" root ::= "a"\nb ::= "a"', 'as EBNF: line 1: cannot read \'"a" root'),
        ('root ::= "a', "as EBNF: line 1: cannot read '\"a'"),
        ("root ::= [a", "as EBNF: line 1: cannot read '[a'"),
        ("root ::= []", "as EBNF: line 1: cannot read '[]'"),
        ('root ::= "a\nb"', "as EBNF: line 1: cannot read"),
        (r'root ::= "\xzz"', "as EBNF: line 1: cannot read"),
        (r'root ::= "\u12"', "as EBNF: line 1: cannot read"),
        (r"root ::= [\ud83d]", "invalid regex"),
        ("root ::= [b-a]", "invalid regex"),
        ('root ::= ("a"', "Expected token ')'"),
        ('root ::= root "a"', "it allows no answer"),
    ],
)
def test_what_is_wrong_with_it_is_said(grammar: str, said: str) -> None:
    error = refusal(Grammar(grammar))
    assert said in str(error)
    assert [violation.field for violation in error.violations] == ["sampling.structured_output.grammar"]


def test_what_looks_like_it_in_larks_syntax_is_larks() -> None:
    grammar = 'start: "::=" | /root ::= a/ // root ::= b\n%ignore /[ ]/'
    assert not is_ebnf(grammar)
    assert holds(Grammar(grammar), "root ::= a")


def test_many_rules_one_within_another_take_no_time() -> None:
    rules = ["root ::= r0", *(f"r{index} ::= r{index + 1}" for index in range(1000)), 'r1000 ::= "a"']
    assert holds(Grammar("\n".join(rules)), "a")


letters = 'ab"\\]-^\n'
literals = st.text(st.sampled_from(letters), max_size=2).map(
    lambda text: ('"' + "".join(f"\\u{ord(c):04x}" if c != "a" else c for c in text) + '"', re.escape(text))
)
classes = st.tuples(st.sampled_from(["", "^"]), st.sets(st.sampled_from(letters), min_size=1)).map(
    lambda told: tuple(
        f"[{told[0]}{''.join(f'{escape}{ord(c):02x}' for c in sorted(told[1]))}]" for escape in ("\\x", "\\x")
    )
)
rules = st.recursive(
    literals | classes | st.just((".", "(?s:.)")),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda both: (f"{both[0][0]} {both[1][0]}", both[0][1] + both[1][1])),
        st.tuples(inner, inner).map(lambda both: (f"({both[0][0]}\n| {both[1][0]})", f"(?:{both[0][1]}|{both[1][1]})")),
        st.tuples(inner, st.sampled_from("?*+")).map(
            lambda told: (f"({told[0][0]}){told[1]}", f"(?:{told[0][1]}){told[1]}")
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=40)
@given(rules, rules)
def test_an_answer_fits_the_grammar_as_it_stands(first: tuple[str, str], second: tuple[str, str]) -> None:
    """Against Python's regular expressions. Not the other way round: of terminals the longest is taken."""
    form = Grammar(f"root ::= {first[0]} other\nother ::= {second[0]}")
    expected = re.compile(f"{first[1]}(?:{second[1]})")
    texts = ["", *letters, *map("".join, itertools.product(letters, repeat=2))]
    assert [text for text in texts if not expected.fullmatch(text) and holds(form, text)] == []
