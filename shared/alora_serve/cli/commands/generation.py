"""Commands that run a conversation: `generate`, `fanout` and `prefill`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alora_serve.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    AsJson,
    ChoiceOption,
    ConversationFile,
    GrammarOption,
    HandleFile,
    JsonSchemaOption,
    MaxTokens,
    Messages,
    MinP,
    RegexOption,
    RepetitionPenalty,
    Samples,
    SaveHandle,
    Seed,
    Stop,
    System,
    Temperature,
    Timeout,
    TopK,
    TopLogprobs,
    TopP,
)
from alora_serve.cli.output import (
    FAILURE_EXIT_CODE,
    console,
    error_to_json,
    errors_reported,
    print_json,
    print_table,
    print_top_logprobs,
)
from alora_serve.cli.output import to_json as json_of

if TYPE_CHECKING:
    from alora_serve.client import GenerationResult, PrefixHandle, Timings, Usage
    from alora_serve.errors import AloraServeError

commands = typer.Typer()


@commands.command()
def generate(
    message: Messages = None,
    system: System = None,
    file: ConversationFile = None,
    handle: HandleFile = None,
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", metavar="NAME", help="Who answers; without it, the base model.")
    ] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    choice: ChoiceOption = None,
    grammar: GrammarOption = None,
    top_logprobs: TopLogprobs = 0,
    samples: Samples = 1,
    save: SaveHandle = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Continue a conversation with the base model or an adapter, printing the answer as it comes.

    The conversation comes from `--message`, a file, standard input or a handle. A file is JSON: a list of
    `{"role", "content"}`, or `{"messages": [...], "documents": [...]}`. Standard input may also be plain text.

    ```
    alora-serve generate --message "What is the capital of France?"
    alora-serve generate --file conversation.json --adapter jailbreak --max-tokens 8
    alora-serve generate -m "Tell me a story." --temperature 0.8 --seed 7 --save story.handle
    alora-serve generate --handle story.handle -m "And then?"
    alora-serve generate -m "Is water wet?" --choice yes --choice no --top-logprobs 5
    alora-serve generate -m "Give the boat a name." --samples 4 --temperature 1
    alora-serve generate --json < conversation.json | jq -r .text
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected
        from alora_serve.cli.conversation import read_prompt
        from alora_serve.cli.form import read_form
        from alora_serve.client import SamplingParams, TokenChunk
        from alora_serve.errors import InvalidRequestError

        if samples > 1 and save is not None:
            raise InvalidRequestError.of("save", "there is a handle for each sample; save that of one answer")
        prompt = read_prompt(messages=message or (), system=system, file=file, handle_file=handle)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            structured_output=read_form(json_schema, regex, choice or (), grammar),
            top_logprobs=top_logprobs,
        )
        with connected(address) as client:
            if samples > 1:
                several = client.sample(
                    None, samples, prompt=prompt, adapter=adapter, sampling=sampling, timeout_seconds=timeout
                )
                _print_samples(adapter, several.results(), as_json=as_json)
                return
            stream = client.generate(prompt=prompt, adapter=adapter, sampling=sampling, timeout_seconds=timeout)
            shown = 0
            for event in stream:
                if isinstance(event, TokenChunk) and not as_json:
                    typer.echo(event.text, nl=False)
                    shown += len(event.text)
            result = stream.result()
        _save(result.handle, save)
        if as_json:
            print_json(_result_to_json(adapter, result))
        else:
            typer.echo(result.text[shown:])
            print_top_logprobs(result)
            console(stderr=True).print(_cost(result.usage, result.timings), style="dim")


@commands.command()
def fanout(
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", metavar="NAME", help="Who answers; repeat for more.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model answers, too.")] = False,
    message: Messages = None,
    system: System = None,
    file: ConversationFile = None,
    handle: HandleFile = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    choice: ChoiceOption = None,
    grammar: GrammarOption = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Ask several adapters about one conversation in one call: it is prefilled once, and all read the same KV.

    Exits with status 1 when one of them failed; the others' answers are printed all the same.

    ```
    alora-serve fanout --file conversation.json --adapter jailbreak --adapter uncertainty --max-tokens 8
    alora-serve fanout -m "Is this safe?" -a jailbreak --base --json
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected
        from alora_serve.cli.conversation import read_prompt
        from alora_serve.cli.form import read_form
        from alora_serve.client import SamplingParams

        prompt = read_prompt(messages=message or (), system=system, file=file, handle_file=handle)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=tuple(stop or ()),
            structured_output=read_form(json_schema, regex, choice or (), grammar),
        )
        targets = [*(adapter or ()), *([""] if base else [])]
        with connected(address) as client:
            results = client.fanout(None, targets, prompt=prompt, sampling=sampling, timeout_seconds=timeout).results()
    answered = list(zip(targets, results, strict=True))
    if as_json:
        print_json([_result_to_json(name, result) for name, result in answered])
    else:
        print_table("", [_row(name, result) for name, result in answered])
    if any(isinstance(result, Exception) for result in results):
        raise typer.Exit(FAILURE_EXIT_CODE)


@commands.command()
def prefill(
    message: Messages = None,
    system: System = None,
    file: ConversationFile = None,
    handle: HandleFile = None,
    save: SaveHandle = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Compute and store a conversation's KV, so that later calls find it, and say what it cost.

    With `--save`, the handle goes to a file; `generate` and `fanout` take it instead of the conversation.

    ```
    alora-serve prefill --file conversation.json --save conversation.handle
    alora-serve generate --handle conversation.handle --adapter jailbreak
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected
        from alora_serve.cli.conversation import handle_text, read_prompt

        prompt = read_prompt(messages=message or (), system=system, file=file, handle_file=handle)
        with connected(address) as client:
            result = client.prefill(prompt=prompt, timeout_seconds=timeout)
        _save(result.handle, save)
        if as_json:
            print_json({"usage": result.usage, "timings": result.timings, "handle": handle_text(result.handle)})
        else:
            console().print(_cost(result.usage, result.timings))
            if save is not None:
                console().print(f"handle saved to {save}", markup=False)


def _save(handle: PrefixHandle | None, file: Any) -> None:
    from alora_serve.cli.conversation import save_handle
    from alora_serve.errors import InvalidRequestError

    if file is None:
        return
    if handle is None:
        raise InvalidRequestError.of("save", "an adapter's answer has no handle; prefill the conversation for one")
    save_handle(handle, file)


def _result_to_json(adapter: str, result: GenerationResult | AloraServeError) -> dict[str, Any]:
    from alora_serve.cli.conversation import handle_text
    from alora_serve.errors import AloraServeError

    if isinstance(result, AloraServeError):
        return {"adapter": adapter, "error": error_to_json(result)}
    handle = handle_text(result.handle) if result.handle else None
    tokens = [spelt.decode(errors="replace") for spelt in result.token_bytes]
    top = [[{**json_of(token), "text": token.text} for token in tokens] for tokens in result.top_logprobs]
    return {"adapter": adapter, **json_of(result), "tokens": tokens, "top_logprobs": top, "handle": handle}


def _print_samples(adapter: str, results: Sequence[GenerationResult], *, as_json: bool) -> None:
    if as_json:
        print_json([_result_to_json(adapter, result) for result in results])
        return
    for index, result in enumerate(results):
        console().print(f"[{index}] {result.text}", markup=False)
        print_top_logprobs(result)


def _row(adapter: str, result: GenerationResult | AloraServeError) -> dict[str, object]:
    from rich.text import Text

    from alora_serve.errors import AloraServeError

    if isinstance(result, AloraServeError):
        return {"adapter": adapter or "base", "answer": Text(str(result), style="red"), "first token": "", "tokens": ""}
    usage = result.usage
    return {
        "adapter": adapter or "base",
        "answer": result.text,
        "first token": f"{result.timings.first_token_seconds:.3f} s",
        "tokens": f"{usage.prompt_tokens} prompt, {usage.cached_tokens} cached, {usage.generated_tokens} generated",
    }


def _cost(usage: Usage, timings: Timings) -> str:
    """Where tokens came from and time went, in one line."""
    parts = [
        f"{usage.prompt_tokens:,} prompt tokens: {usage.cached_tokens:,} cached, {usage.computed_tokens:,} computed"
    ]
    if usage.fetched_bytes or usage.stored_bytes:
        # A worker fetches what base prefill has just computed as well; with nothing cached, that is all it fetched.
        fresh = " of it" if usage.stored_bytes and not usage.cached_tokens else ""
        parts.append(f"{usage.stored_bytes >> 10:,} KiB stored, {usage.fetched_bytes >> 10:,} KiB{fresh} fetched")
    if usage.generated_tokens:
        parts.append(f"{usage.generated_tokens} generated, first after {timings.first_token_seconds:.3f} s")
    parts.append(f"{timings.total_seconds:.3f} s in all")
    for what, reasons in (("not fetched", usage.store_misses), ("not stored", usage.store_drops)):
        parts += [
            f"{count} {'block' if count == 1 else 'blocks'} {what}: {reason}"
            for reason, count in reasons.items()
            if reason != "absent"
        ]
    return "; ".join(parts)
