"""``make chaos`` fails for whatever it could not show, and says what that was."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import run_chaos
from faults.conversations import SHORT_ANSWER, new_prompt, wrong_answers
from faults.harness import CannotBreakError, Chaos, Row, Scenario, Tally
from faults.load import Outcomes
from faults.load import row as load_row

from deployment import save_tiny_model


async def fine(chaos: Chaos) -> Sequence[Row]:
    tally = Tally(requests=1)
    tally.strike()
    tally.answered.append((time.monotonic(), time.monotonic()))
    return [tally.row("fine")]


async def never_answered_again(chaos: Chaos) -> Sequence[Row]:
    tally = Tally(requests=1, answered=[(time.monotonic(), time.monotonic())])
    tally.strike()
    return [tally.row("never answered again")]


async def without_its_program(chaos: Chaos) -> Sequence[Row]:
    pytest.skip("needs redis-server")


async def without_the_right(chaos: Chaos) -> Sequence[Row]:
    raise CannotBreakError("needs the right to mount")


async def broken(chaos: Chaos) -> Sequence[Row]:
    raise ZeroDivisionError("a defect")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs these scenarios as ``make chaos`` does; the exit status and the rows of the file by fault."""

    def run(*scenarios: Scenario, flags: Sequence[str] = ()) -> tuple[int, dict[str, dict[str, Any]]]:
        monkeypatch.setattr(run_chaos, "SCENARIOS", {scenario.__name__: scenario for scenario in scenarios})
        monkeypatch.setattr(run_chaos, "OUTPUT", tmp_path / "chaos.json")
        monkeypatch.setattr(run_chaos, "save_tiny_model", lambda directory: None)
        monkeypatch.setattr(sys, "argv", ["run_chaos.py", *flags])
        status = 0
        try:
            run_chaos.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, {row["fault"]: row for row in json.loads((tmp_path / "chaos.json").read_text())}

    return run


def test_a_run_that_showed_everything_succeeds(ran: Any) -> None:
    assert ran(fine) == (0, {"fine": ran(fine)[1]["fine"]})


@pytest.mark.parametrize("scenario", [without_its_program, without_the_right])
def test_what_a_machine_cannot_do_is_a_row_and_a_failure_unless_that_is_allowed(scenario: Scenario, ran: Any) -> None:
    status, rows = ran(scenario, fine)
    assert status == 1
    assert rows[scenario.__name__]["details"]["left_out"].startswith("needs")
    assert rows["fine"]["requests"] == 1, "the others go on"
    assert ran(scenario, fine, flags=["--allow-missing"])[0] == 0


@pytest.mark.parametrize(("scenario", "fault"), [(broken, "broken"), (never_answered_again, "never answered again")])
def test_what_was_not_shown_is_a_failure(scenario: Scenario, fault: str, ran: Any) -> None:
    status, rows = ran(scenario, fine, flags=["--allow-missing"])
    assert status == 1
    assert rows[fault]["failed"] == 1
    assert rows["fine"]["failed"] == 0


def test_a_new_conversation_answered_with_another_token_is_wrong(tmp_path: Path) -> None:
    model, prompt = save_tiny_model(tmp_path), new_prompt(3, 82)
    right = model.cold_tokens("", prompt, SHORT_ANSWER.max_tokens)
    others = [model.cold_tokens("plain", prompt, SHORT_ANSWER.max_tokens), right[:-1], (*right[:-1], right[-1] ^ 1)]
    assert wrong_answers(model, [(prompt, right)]) == []
    assert len(wrong_answers(model, [(prompt, other) for other in others])) == len(others)


def test_what_goes_wrong_for_a_noisy_tenant_counts_in_the_row_of_the_quiet_one() -> None:
    quiet, noisy = Outcomes(seconds=[0.1]), Outcomes(wrong=1, failures=["InternalError: lost"])
    quiet.blame(noisy)
    told = load_row("beside a noisy tenant", quiet)
    assert (told.wrong_tokens, told.failed) == (1, 1)
    assert told.details["first_failure"] == "the other tenant: InternalError: lost"
