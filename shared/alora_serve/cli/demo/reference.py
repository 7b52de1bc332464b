"""Compares served answers with stock PEFT, in a process of its own after the services have stopped."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alora_serve.cli.demo.result import Answer, Check
from alora_serve.cli.local import machine
from alora_serve.errors import ConfigError


async def compare_with_peft(
    answers: Sequence[Answer], *, model: Path, adapter_root: Path, dtype: str, threads: int
) -> tuple[tuple[Check, ...], dict[str, str]]:
    """A check for each answer, in order, and the versions of what computed the reference.

    Raises:
        ConfigError: the reference could not be computed.
    """
    request = {
        "model": str(model),
        "dtype": dtype,
        "cases": [
            {
                "name": f"{answer.adapter or 'base'}, {len(answer.prompt):,} tokens of prompt: {answer.text.strip()!r}",
                "adapter": str(adapter_root / answer.adapter) if answer.adapter else None,
                "prompt": answer.prompt,
                "tokens": answer.tokens,
            }
            for answer in answers
        ],
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "alora_serve.cli.peft_check"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=machine.service_environment({**os.environ, "HF_HUB_OFFLINE": "1"}, threads=threads),
    )
    try:
        output, errors = await process.communicate(json.dumps(request).encode())
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        last = (errors.decode(errors="replace").strip().splitlines() or [""])[-1]
        raise ConfigError(f"PEFT's own answer could not be computed (exit status {process.returncode}): {last}")
    report: dict[str, Any] = json.loads(output)
    return tuple(_check(case) for case in report["cases"]), report["versions"]


def _check(case: dict[str, Any]) -> Check:
    if "peft_tokens" in case:
        detail = f"tokens {case['peft_tokens']}"
    else:
        detail = f"largest gap {case['largest_gap']:.3f} in logits"
    return Check(case["name"], case["equal"], detail)
