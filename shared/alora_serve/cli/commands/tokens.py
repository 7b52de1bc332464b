"""The command that shows a conversation's tokens: `tokenize`."""

from __future__ import annotations

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
from alora_serve.cli.output import console, errors_reported, print_json

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
