"""Commands that look at tokens: `tokenize` and `score`."""

from __future__ import annotations

from typing import Annotated

import typer

from alora_serve.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    AsJson,
    ConversationFile,
    HandleFile,
    Messages,
    System,
    Timeout,
)
from alora_serve.cli.output import console, errors_reported, print_json, print_table

commands = typer.Typer()


@commands.command()
def tokenize(
    message: Messages = None,
    system: System = None,
    file: ConversationFile = None,
    handle: HandleFile = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """Show the tokens of a conversation as the model gets them, without running it.

    First those of the conversation, then those of the generation prompt, after which the model answers. An adapter's
    invocation is not among them: the worker places it.

    ```
    alora-serve tokenize --message "What is the capital of France?"
    alora-serve tokenize --file conversation.json --json | jq '.prefix_tokens | length'
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected
        from alora_serve.cli.conversation import read_prompt

        prompt = read_prompt(messages=message or (), system=system, file=file, handle_file=handle)
        with connected(address) as client:
            tokenized = client.tokenize(prompt=prompt, timeout_seconds=timeout)
        if as_json:
            print_json(tokenized)
            return
        for name, tokens in (
            ("conversation", tokenized.prefix_tokens),
            ("generation prompt", tokenized.generation_prompt_tokens),
        ):
            console().print(f"{name}, {len(tokens):,} tokens: {' '.join(map(str, tokens))}", soft_wrap=True)


@commands.command()
def score(
    continuation: Annotated[
        list[str] | None, typer.Option("--continuation", "-c", metavar="TEXT", help="To score; repeat for more.")
    ] = None,
    message: Messages = None,
    system: System = None,
    file: ConversationFile = None,
    handle: HandleFile = None,
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", metavar="NAME", help="By whom; without it, the base model.")
    ] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Say how likely texts are after a conversation: which of several answers the model, or an adapter, leans to.

    The figure is the natural logarithm of a text's probability; *share* is what it has among those given. Longer texts
    are less likely: compare texts of like length, or look at the mean a token.

    ```
    alora-serve score -m "Is water wet? Yes or no." -c Yes -c No
    alora-serve score --file conversation.json --adapter jailbreak -c yes -c no --json | jq '.scores[].total'
    ```
    """
    with errors_reported(as_json=as_json):
        from math import exp

        from alora_serve.cli.connection import connected
        from alora_serve.cli.conversation import read_prompt

        prompt = read_prompt(messages=message or (), system=system, file=file, handle_file=handle)
        texts = continuation or []
        with connected(address) as client:
            result = client.score(None, texts, adapter=adapter, prompt=prompt, timeout_seconds=timeout)
        scored = list(zip(texts, result.scores, strict=True))
        if as_json:
            scores = [
                {"text": text, "token_ids": one.token_ids, "logprobs": one.logprobs, "total": one.total}
                for text, one in scored
            ]
            print_json({"scores": scores, "usage": result.usage, "timings": result.timings})
            return
        highest = max(one.total for one in result.scores)
        mass = sum(exp(one.total - highest) for one in result.scores)
        rows = [
            {
                "text": text,
                "log-probability": f"{one.total:.3f}",
                "share": f"{exp(one.total - highest) / mass:.1%}",
                "mean a token": f"{one.total / len(one.token_ids):.3f}",
                "tokens": len(one.token_ids),
            }
            for text, one in scored
        ]
        print_table("", rows)
