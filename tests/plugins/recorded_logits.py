"""What the engine chose an answer's tokens from."""

from __future__ import annotations

from unittest.mock import patch

import torch

from alora_serve.types import PrefixHandle, Resume
from in_process import Answer, Stack


async def generate_with_logits(
    stack: Stack, handle: PrefixHandle, adapter: str = "", *, resume: Resume | None = None, **sampling: object
) -> tuple[Answer, torch.Tensor]:
    """:meth:`Stack.generate` alone on its stack, and the model's logits: ``[generated tokens, vocabulary]``, fp32."""
    runner = stack.core.engine._stepper._runner
    forward, passes = runner.forward, []

    def recording(*args: object) -> torch.Tensor | None:
        logits: torch.Tensor | None = forward(*args)  # type: ignore[arg-type]
        if logits is not None:
            passes.append(logits.clone())
        return logits

    with patch.object(runner, "forward", recording):
        answer = await stack.generate(handle, adapter, resume=resume, **sampling)
    return answer, torch.cat(passes)
