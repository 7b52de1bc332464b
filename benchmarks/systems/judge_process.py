"""Compares answers with stock PEFT run cold: the child of ``correctness.py``. The rule is the command line's own."""

from __future__ import annotations

from typing import Any

from systems.answering import answer_lines

from alora_serve.cli import peft_check


class Judge:
    """Keeps no model from one adapter to the next: each is a whole one in float32."""

    def judge(self, model: str, dtype: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each case (``adapter``, ``prompt``, ``tokens``) whether it is ``equal``, and ``largest_gap`` in bf16."""
        judged: list[dict[str, Any]] = peft_check.check({"model": model, "dtype": dtype, "cases": cases})["cases"]
        return judged


if __name__ == "__main__":
    answer_lines(lambda settings: Judge())
