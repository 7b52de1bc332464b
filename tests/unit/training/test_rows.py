"""Reading rows names what is wrong with a line; the split keeps rows with common texts together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alora_serve.errors import ConfigError
from alora_serve.training.rows import Row, read_rows, split_rows
from alora_serve.types import ChatMessage, Document


@pytest.mark.parametrize(
    "line", ["{", '{"messages": []}', '{"target": "yes"}', "[1]", '{"messages": [], "target": "yes"}',
             '{"messages": [{"role": "user", "content": "a"}], "target": 3}']
)  # fmt: skip
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "target": "yes"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: "):
        read_rows(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_a_row_is_read_whole(tmp_path: Path) -> None:
    record = {
        "id": "a-1",
        "source": "squad",
        "messages": [{"role": "user", "content": "Hi"}],
        "documents": [{"title": "T", "text": "Text"}],
        "target": "yes",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert read_rows(path) == [Row((ChatMessage("user", "Hi"),), (Document("T", "Text"),), "yes", "a-1", "squad")]


LINE_ENDS = "\u2028 \u2029 \x85"
"""Of Unicode, not of JSONL: they may stand in JSON as they are."""


def test_a_line_ends_where_jsonl_says_so(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": LINE_ENDS}], "target": LINE_ENDS}
    path = tmp_path / "rows.jsonl"
    path.write_text(2 * f"{json.dumps(record, ensure_ascii=False)}\r\n", encoding="utf-8", newline="")
    first, second = read_rows(path)
    assert (first.target, first.messages[0].content, second.row_id) == (LINE_ENDS, LINE_ENDS, "rows.jsonl:2")


def row(question: str, document: str = "") -> Row:
    documents = (Document("", document),) if document else ()
    return Row((ChatMessage("user", question),), documents, "yes", question)


def test_rows_that_share_a_text_stay_together() -> None:
    rows = [row(f"q{i // 2}", f"d{i // 6}") for i in range(60)] + [row("q0", "d9"), row("other")]
    training, validation = split_rows(rows, 0.2, seed=3)
    assert sorted([*training, *validation], key=repr) == sorted(rows, key=repr)
    assert 0 < len(validation) <= round(0.2 * len(rows))

    def texts(side: list[Row]) -> set[str]:
        return {t for r in side for t in (r.messages[-1].content, *(d.text for d in r.documents))}

    assert not texts(training) & texts(validation)
    assert split_rows(rows, 0.2, seed=3) == (training, validation)
    assert split_rows(rows, 0.2, seed=4) != (training, validation)
    assert split_rows(rows, 0.0, seed=3) == (rows, [])
