"""Grammars in llama.cpp's EBNF (GBNF), as vLLM's clients send them, put into Lark's syntax token by token."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Final

_RULE: Final = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)
_ESCAPE: Final = r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[^xuU\n])"
_TOKEN: Final = re.compile(
    rf"""
    (?P<nothing>\s+|\#[^\n]*)
    | (?P<rule>[A-Za-z0-9_-]+)\s*::=
    | (?P<name>[A-Za-z0-9_-]+)
    | "(?P<literal>(?:{_ESCAPE}|[^"\\\n])*)"
    | \[(?P<negated>\^?)(?P<members>(?:{_ESCAPE}|[^\]\\\n])+)\]
    | (?P<any>\.)
    | (?P<operator>[|()*+?]|\{{[0-9]+(?:,[0-9]*)?\}})
    """,
    re.VERBOSE,
)
_CHARACTER: Final = re.compile(r"\\(?:x(..)|u(.{4})|U(.{8})|(.))|(.)")
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}


_Token = re.Match[str]


def is_ebnf(grammar: str) -> bool:
    """Whether a line of it begins a rule of EBNF; in Lark's syntax none can."""
    return _RULE.search(grammar) is not None


def lark_of(grammar: str) -> str:
    """The same grammar in Lark's syntax.

    Raises:
        ValueError: it is malformed; says where.
    """
    rules = _rules_of(grammar)
    terminals = _terminals(rules)
    names = {rule: f"{'T' if rule in terminals else 'r'}{index}" for index, rule in enumerate(rules)}
    names["root"] = "start"
    return "\n".join(
        f"{names[rule]}: {' '.join(names[token['name']] if token['name'] else _in_lark(token) for token in tokens)}"
        for rule, tokens in rules.items()
    )


def _rules_of(grammar: str) -> dict[str, list[_Token]]:
    rules, tokens, at = dict[str, list[_Token]](), list[_Token](), 0
    while at < len(grammar):
        token = _TOKEN.match(grammar, at)
        if token is None or not (rules or token["rule"] or token["nothing"]):
            raise ValueError(f"line {grammar.count(chr(10), 0, at) + 1}: cannot read {grammar[at : at + 20]!r}")
        if token["rule"] in rules:
            raise ValueError(f"there are two rules {token['rule']!r}")
        if token["rule"]:
            tokens = rules[token["rule"]] = []
        elif not token["nothing"]:
            tokens.append(token)
        at = token.end()
    if "root" not in rules:
        raise ValueError("there is no rule 'root'")
    for rule, tokens in rules.items():
        if missing := _named(tokens) - rules.keys():
            raise ValueError(f"there is no rule {min(missing)!r}, which {rule!r} names")
    return rules


def _named(tokens: list[_Token]) -> set[str]:
    return {token["name"] for token in tokens if token["name"]}


def _in_lark(token: _Token) -> str:
    if token["any"]:
        return "/(?s:.)/"
    if token["members"]:
        return f"/[{token['negated']}{_ranges(token['members'])}]/"
    if token["literal"] is not None:
        return f"/{''.join(map(_character, _CHARACTER.finditer(token['literal'])))}/" if token["literal"] else '""'
    return token["operator"]


def _ranges(members: str) -> str:
    """The members of a class, in the syntax of regular expressions."""
    found, ranges, at = list(_CHARACTER.finditer(members)), list[str](), 0
    while at < len(found):
        is_range = at + 2 < len(found) and found[at + 1][0] == "-"
        ranges.append("-".join(_character(character) for character in found[at : at + 1 + 2 * is_range : 2]))
        at += 1 + 2 * is_range
    return "".join(ranges)


def _character(found: re.Match[str]) -> str:
    x, u, long_u, escaped, plain = found.groups()
    if code := x or u or long_u:
        return f"\\x{{{int(code, 16):x}}}"
    character = plain or _ESCAPES.get(escaped, escaped)
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"


def _terminals(rules: dict[str, list[_Token]]) -> set[str]:
    """Rules that lead to no reference to themselves. They are found as a whole, far faster than letter by letter."""
    users, waits = defaultdict[str, list[str]](list), dict[str, int]()
    for rule, tokens in rules.items():
        waits[rule] = len(named := _named(tokens))
        for name in named:
            users[name].append(rule)
    ready = [rule for rule, count in waits.items() if not count]
    for rule in ready:  # which grows meanwhile
        for user in users[rule]:
            waits[user] -= 1
            if not waits[user]:
                ready.append(user)
    return set(ready)
