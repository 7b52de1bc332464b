"""Intrinsics like the published ones, and what a model could answer: compared with mellea's formatter."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

Token = tuple[str, float, dict[str, float]]
"""A token's text, its log-probability, and those of the most likely ones in its place."""

DOCUMENTS = (
    {"doc_id": "1", "text": "Lisbon lies on the Tagus. It is Portugal's capital! About 545,000 people live there."},
    {"doc_id": "guide", "text": "Trams climb to the castle.  They are often full, e.g. in summer."},
)
CONVERSATION = (
    {"role": "user", "content": "Where is Lisbon? I want to go."},
    {"role": "assistant", "content": "Lisbon is in Portugal. It lies on the Tagus.\n\nTake a tram. It climbs."},
)

ANSWERABILITY = """
model: ~
response_format: |
  {"type": "string", "enum": ["answerable", "unanswerable"]}
transformations:
  - type: likelihood
    categories_to_values:
      "answerable": 1.0
      "unanswerable": 0.0
    input_path: []
  - type: nest
    input_path: []
    field_name: "answerability_likelihood"
instruction: ~
parameters:
  max_completion_tokens: 6
sentence_boundaries: ~
"""

CERTAINTY = """
model: ~
response_format: '{"type": "object", "properties": {"certainty": {"type": "integer", "minimum": 0, "maximum": 9}}}'
transformations:
  - {type: likelihood, input_path: [certainty], categories_to_values:
      {0: 0.05, 1: 0.15, 2: 0.25, 3: 0.35, 4: 0.45, 5: 0.55, 6: 0.65, 7: 0.75, 8: 0.85, 9: 0.95}}
instruction: "<certainty>"
"""

RELEVANCE = """
model: context_relevance
name: relevance
response_format: {type: object, properties: {context_relevance: {enum: [irrelevant, relevant, partially relevant]}}}
transformations: ~
instruction: "{{relevance}} of {document_content} to: {last_message}"
parameters: {max_completion_tokens: 15, temperature: 0.0}
"""

CITATIONS = """
model: ~
response_format: |
  {"type": "array", "items": {"type": "object",
   "properties": {"r": {"type": "integer"}, "c": {"type": "array", "items": {"type": "integer"}}}}}
transformations:
  - {type: explode, input_path: [], target_field: c}
  - {type: drop_duplicates, input_path: [], target_fields: [r, c]}
  - type: decode_sentences
    source: last_message
    input_path: [~, r]
    output_names: {begin: response_begin, end: response_end, text: response_text}
  - type: decode_sentences
    source: documents
    input_path: [~, c]
    output_names: {document_id: citation_doc_id, begin: citation_begin, end: citation_end, text: citation_text}
  - type: project
    input_path: []
    retained_fields: [response_begin, response_end, response_text, citation_doc_id, citation_begin, citation_end,
                      citation_text]
  - type: merge_spans
    input_path: []
    group_fields: [response_begin, response_end, response_text, citation_doc_id]
    begin_field: citation_begin
    end_field: citation_end
    text_field: citation_text
instruction: "Which sentences of the documents support each sentence of the last response?"
parameters: {max_completion_tokens: 4096}
sentence_boundaries: {last_message: r, documents: c}
"""

HALLUCINATION = """
model: ~
response_format: |
  {"type": "array", "items": {"type": "object",
   "properties": {"r": {"type": "integer"}, "f": {"type": "string", "enum": ["faithful", "unfaithful", "NA"]}}}}
transformations:
  - {type: likelihood, input_path: [~, f], categories_to_values: {faithful: 1.0, unfaithful: 0.0, NA: 0.5}}
  - {type: decode_sentences, source: last_message, input_path: [~, r], output_names: {begin: b, end: e, text: t}}
  - {type: project, input_path: [], retained_fields: {b: begin, e: end, t: text, f: faithful}}
instruction: "Faithful?"
sentence_boundaries: {last_message: i}
"""

HISTORY = """
model: ~
response_format: '{"type": "array", "items": {"type": "object"}}'
transformations:
  - type: decode_sentences
    source: [documents, all_but_last_message]
    input_path: [~, c]
    output_names: {document_id: doc, message_index: turn, text: text, begin: begin}
sentence_boundaries: {documents: c, all_but_last_message: c}
"""

DOCUMENTS_AS = """
model: ~
response_format: ~
transformations: []
docs_as_message: {form}
instruction: "Judge {{last_message}}."
"""

DEFINITIONS = {
    "answerability": ANSWERABILITY,
    "certainty": CERTAINTY,
    "relevance": RELEVANCE,
    "citations": CITATIONS,
    "hallucination": HALLUCINATION,
    "history": HISTORY,
    **{f"documents as {form}": DOCUMENTS_AS.format(form=form) for form in ("string", "json", "roles")},
}


@dataclass(frozen=True)
class Case:
    name: str
    definition: str
    answer: str = '"yes"'
    tokens: list[Token] = field(default_factory=list)
    messages: tuple[dict[str, str], ...] = CONVERSATION
    documents: tuple[dict[str, str], ...] = DOCUMENTS
    parameters: dict[str, str] = field(default_factory=dict)


def tokens_of(answer: str, rng: random.Random, words: list[str]) -> list[Token]:
    """The answer cut at random, with likely and unlikely alternatives, some of which begin words."""
    tokens: list[Token] = []
    rest = answer
    while rest:
        # Cut where a quotation mark or a digit begins: tokens of most vocabularies do not hold both of a border.
        length = 1 if rest[0] in '"[]{}:, ' or rest[0].isdigit() else rng.randint(1, 6)
        text = rest[:length]
        for position, character in enumerate(text[1:], start=1):
            if character in '"[]{}:, ':
                text = text[:position]
                break
        rest = rest[len(text) :]
        others = {word[: rng.randint(1, len(word))] for word in rng.sample(words, k=min(4, len(words)))} | {"x", "\n"}
        weights = [rng.random() + 0.01 for _ in range(len(others) + 1)]
        logprobs = [math.log(weight / sum(weights)) for weight in weights]
        alternatives = dict(zip(sorted(others), logprobs[1:], strict=True))
        if rng.random() < 0.5:
            alternatives.setdefault(text, logprobs[0])
        tokens.append((text, logprobs[0], alternatives))
    return tokens


def cases() -> list[Case]:
    """All of them, the same each time."""
    rng = random.Random(7)
    found = [
        Case("answerable", "answerability", '"answerable"', tokens_of('"answerable"', rng, ["unanswerable", "ans"])),
        Case("said as a whole", "answerability", '"unanswerable"', [('"unanswerable"', -0.1, {'"answerable"': -2.5})]),
        Case("relevance", "relevance", '{"context_relevance": "relevant"}', parameters={"document_content": "a {b}"}),
        Case("nothing cited", "citations", "[]"),
        Case("one cited", "citations", '[{"r": 0, "c": [0]}]'),
        Case("neighbours merge", "citations", '[{"r": 1, "c": [2, 0, 1, 0]}, {"r": 0, "c": [4]}, {"r": 3, "c": []}]'),
        Case("documents only", "history", '[{"c": 0}, {"c": 4}]'),
        Case("history", "history", '[{"c": 3}, {"c": 5}, {"c": 6}]'),
        *(Case(name, name) for name in DEFINITIONS if name.startswith("documents as")),
    ]  # fmt: skip
    verdicts = ["faithful", "unfaithful", "NA"]
    for number in range(12):
        word = json.dumps(rng.choice(["answerable", "unanswerable"]))
        tokens = tokens_of(word, rng, ["answerable", "unanswerable", "other"])
        found.append(Case(f"answerability {number}", "answerability", word, tokens))
        certainty = json.dumps({"certainty": rng.randint(0, 9)})
        found.append(Case(f"certainty {number}", "certainty", certainty, tokens_of(certainty, rng, list("0123456789"))))
        cited = [{"r": rng.randint(0, 3), "c": rng.sample(range(5), k=rng.randint(0, 4))} for _ in range(number % 4)]
        found.append(Case(f"citations {number}", "citations", json.dumps(cited)))
        judged = json.dumps([{"r": index, "f": rng.choice(verdicts)} for index in range(4)])
        found.append(Case(f"hallucination {number}", "hallucination", judged, tokens_of(judged, rng, verdicts)))
    return found


def request_of(case: Case) -> dict[str, Any]:
    """What mellea's formatter takes."""
    return {"messages": list(case.messages), "extra_body": {"documents": list(case.documents)}}
