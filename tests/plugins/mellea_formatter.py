"""What mellea's formatter makes of ``intrinsic_cases``. As a program, where mellea is installed, it records that.

In use::

    python tests/plugins/mellea_formatter.py > tests/unit/intrinsics/mellea_recording.jsonl
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from intrinsic_cases import DEFINITIONS, Case, cases, request_of


def by_mellea(case: Case) -> dict[str, Any]:
    """The rewritten messages and documents, and the result or the name of what the formatter raises."""
    import yaml
    from mellea.formatters.granite.base.types import ChatCompletion, ChatCompletionResponse
    from mellea.formatters.granite.intrinsics import IntrinsicsResultProcessor, IntrinsicsRewriter

    config = yaml.safe_load(DEFINITIONS[case.definition])
    rewriter, processor = IntrinsicsRewriter(config_dict=config), IntrinsicsResultProcessor(config_dict=config)
    request = rewriter.transform(ChatCompletion.model_validate(request_of(case)), **case.parameters)
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": case.answer}}
    if case.tokens:
        choice["logprobs"] = {"content": [_token(*token) for token in case.tokens]}
    response = ChatCompletionResponse.model_validate({"choices": [choice]})
    try:
        result = json.loads(processor.transform(response, request).choices[0].message.content)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        result = {"error": type(error).__name__}
    sent = request.model_dump()
    return {
        "messages": [{"role": message["role"], "content": message["content"]} for message in sent["messages"]],
        "documents": (sent.get("extra_body") or {}).get("documents") or [],
        "result": result,
    }


def _token(text: str, logprob: float, alternatives: dict[str, float]) -> dict[str, Any]:
    top = [{"token": other, "logprob": value} for other, value in alternatives.items()]
    return {"token": text, "logprob": logprob, "top_logprobs": top}


if __name__ == "__main__":
    print(json.dumps({"mellea": version("mellea")}))
    for case in cases():
        print(json.dumps({"case": case.name, **by_mellea(case)}, ensure_ascii=False))
