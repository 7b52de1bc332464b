"""The command `chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from alora_serve.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    AsJson,
    ConversationFile,
    Seed,
    Stop,
    System,
    Temperature,
    Timeout,
    TopP,
)
from alora_serve.cli.output import FAILURE_EXIT_CODE, errors_reported

commands = typer.Typer()
ANSWER_TOKENS = 512


@commands.command()
def chat(
    intrinsics: Annotated[
        list[str] | None,
        typer.Option("--intrinsic", "-i", metavar="NAME", help="Adapter to ask after every turn; repeat for more."),
    ] = None,
    system: System = None,
    file: ConversationFile = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most tokens of an answer; unset: 512, or what the context leaves."),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    remember: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep the lines typed on a terminal for the next chat.")
    ] = True,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Chat with the base model, and ask adapters about the conversation as it goes.

    Each turn goes on from the handle of the last one, so nothing before it is computed again: adapters answer from the
    conversation's KV, and `/usage` shows it.

    | typed | does |
    | --- | --- |
    | `/adapter NAME` | asks an adapter about the conversation so far; its answer stays outside, unless `/keep` |
    | `/intrinsics NAME ...` | asks these after every turn |
    | `/adapters`, `/usage`, `/system TEXT` | what there is; what the last turn cost; what the system says first |
    | `/undo`, `/retry` | takes your last turn back; has it answered again |
    | `/save FILE`, `/load FILE` | the conversation as JSON, as `generate --file` takes it |
    | `/help`, `/quit` | all commands; leave |

    Ctrl-C stops an answer; pressed again, it leaves, as the end of input does. In a pipe, each line is a turn or a
    command, answers go to standard output, and the exit status is 1 if anything failed. With `--json`, every event is
    an object, the last before the next line is read is `{"event": "waiting"}`, and a line may be a JSON string.

    ```
    alora-serve chat
    alora-serve chat --system "Answer in one sentence." --intrinsic jailbreak
    alora-serve chat --file conversation.json --temperature 0.7 --seed 7
    echo "What is a tide?" | alora-serve chat --intrinsic jailbreak
    echo "What is a tide?" | alora-serve chat --json | jq -c 'select(.event == "answer") | .usage'
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.chat.conversation import Conversation
        from alora_serve.cli.chat.start import run_chat
        from alora_serve.cli.conversation import STANDARD_INPUT, read_prompt
        from alora_serve.client import SamplingParams
        from alora_serve.errors import InvalidRequestError

        if file == STANDARD_INPUT:
            raise InvalidRequestError.of("file", "standard input has the lines of the chat: name a file")
        conversation = Conversation() if file is None else Conversation.of(read_prompt(file=file))
        done = run_chat(
            address,
            conversation if system is None else conversation.told(system),
            tuple(intrinsics or ()),
            sampling=SamplingParams(
                max_tokens=max_tokens,
                default_max_tokens=ANSWER_TOKENS,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=tuple(stop or ()),
            ),
            timeout_seconds=timeout,
            as_json=as_json,
            remember=remember,
        )
    if not done:
        raise typer.Exit(FAILURE_EXIT_CODE)
