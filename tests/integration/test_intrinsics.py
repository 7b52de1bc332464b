"""Intrinsics on real processes: typed results of adapters with an ``io.yaml``, on one prefill."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from typer.testing import CliRunner, Result

from alora_serve.cli.app import app
from alora_serve.client import ChatMessage, Document, IntrinsicResult, JsonSchema
from alora_serve.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    AloraServeError,
    HandleInvalidError,
    IntrinsicOutputError,
    IntrinsicUndefinedError,
    InvalidRequestError,
)
from alora_serve.types import PrefixHandle
from deployment import (
    ANSWER_TOKENS,
    BLOCK_TOKENS,
    GREEDY,
    YES_OR_NO,
    Deployed,
    ServedModel,
    deployed,
    save_tiny_model,
    tokens_of,
)
from tiny_models import greedy, load_peft, save_adapter

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

CITED = """
model: ~
response_format: |
  {"type": "array", "minItems": 1, "maxItems": 1, "items":
    {"type": "object", "properties": {"s": {"enum": [0, 1, 2]}}, "required": ["s"], "additionalProperties": false}}
transformations:
  - {type: decode_sentences, source: documents, input_path: [~, s], output_names: {text: text, document_id: document}}
instruction: Which sentence?
sentence_boundaries: {documents: d}
"""
DEFINITIONS = {
    "asked": f"{YES_OR_NO}instruction: Is it {{what}}?\nparameters: {{max_completion_tokens: 32}}\n",
    "also": f"{YES_OR_NO}instruction: Or not?\n",
    "judging": YES_OR_NO,
    "plain": f"{YES_OR_NO}instruction: Is it?\n",
    "cites": CITED,
    "cut": f"{YES_OR_NO}parameters: {{max_completion_tokens: 2}}\n",
    "broken": f"{YES_OR_NO}colour: red\n",
    "unfit": YES_OR_NO.replace('"enum": ["yes", "no"]', '"pattern": "("'),
    "extreme": f"{YES_OR_NO}parameters: {{repetition_penalty: 200}}\n",
}
OLD_INVOCATION = "<|guard|>certainty<|guard|>"
DOCUMENTS = [Document("", "The sea is deep. It is salt.", "sea"), Document("", "Ships go over it.")]


def conversation(subject: str) -> list[ChatMessage]:
    """A conversation that no other test has, of several blocks."""
    told = f"The {subject} is deep and salt, and ships go over it. " * 2
    return [ChatMessage("user", f"{told}Is it deep?"), ChatMessage("assistant", f"{subject}: yes.")]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployed]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("intrinsics")
    model = save_tiny_model(root)
    answering = list(tokens_of("<|start|>assistant\n", model.directory))
    for seed, (name, text) in enumerate(DEFINITIONS.items()):
        settings: dict[str, Any] = {"target_modules": "all-linear"}
        if name != "plain":
            settings["alora_invocation_tokens"] = answering
        save_adapter(model.directory, root / "adapters" / name, seed=seed, **settings)
        (root / "adapters" / name / "io.yaml").write_text(text)
    _save_old_format(model, root)
    async with deployed(model, f"lmdb://{root / 'store'}", block_tokens=str(BLOCK_TOKENS)) as running:
        yield running


def _save_old_format(model: ServedModel, root: Path) -> None:
    """An adapter of IBM's old package, and what PEFT must be told to be on from the same token."""
    tokens = list(tokens_of(OLD_INVOCATION, model.directory))
    save_adapter(
        model.directory, root / "peft" / "old", seed=70, target_modules="all-linear", alora_invocation_tokens=tokens[1:]
    )
    shutil.copytree(root / "peft" / "old", root / "adapters" / "old")
    file = root / "adapters" / "old" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"alora_invocation_tokens": None, "invocation_string": OLD_INVOCATION}
    file.write_text(json.dumps(config))


async def run(serving: Deployed, messages: list[ChatMessage] | None, name: str, **more: Any) -> IntrinsicResult:
    return await serving.client.run_intrinsic(messages, name, **more)


async def test_the_likelihood_is_that_of_the_models_own_probabilities(serving: Deployed) -> None:
    messages = conversation("asked sea")
    found = await run(serving, messages, "asked", parameters={"what": "salt"})
    question = [*messages, ChatMessage("user", "Is it salt?")]
    schema = JsonSchema('{"type": "string", "enum": ["yes", "no"]}')
    asked = serving.client.generate(question, adapter="asked", structured_output=schema, top_logprobs=20)
    answer = await asked.result()
    assert found.raw_text == answer.text
    assert json.loads(found.raw_text) in {"yes", "no"}
    at = answer.token_bytes.index(b'"') + 1
    chances = {token.token_bytes: math.exp(token.logprob) for token in answer.top_logprobs[at]}
    chances[answer.token_bytes[at]] = math.exp(answer.logprobs[at])
    yes, no = (sum(p for token, p in chances.items() if token and word.startswith(token)) for word in (b"yes", b"no"))
    assert found.result == {"likelihood": pytest.approx(yes / (yes + no), rel=1e-5)}
    (shares,) = found.probabilities.values()
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) <= {"yes", "no"}
    assert found.probabilities.keys() == {""}
    assert found.usage.generated_tokens == len(answer.token_ids)
    assert found.usage.invocation_start == answer.usage.invocation_start


async def test_intrinsics_share_one_prefill_and_compute_only_what_follows_the_conversation(serving: Deployed) -> None:
    messages = conversation("shared sea")
    names = ["asked", "also", "judging"]
    results = await serving.client.run_intrinsics(messages, names, parameters={"what": "deep"}).results()
    assert all(isinstance(result, IntrinsicResult) for result in results)
    usages = [result.usage for result in results if isinstance(result, IntrinsicResult)]
    handle = (await serving.client.prefill(messages)).handle
    shared = len(handle.prefix_tokens)
    instructions = {
        "asked": [*messages, ChatMessage("user", "Is it deep?")],
        "also": [*messages, ChatMessage("user", "Or not?")],
        "judging": messages,
    }
    for name, usage in zip(names, usages, strict=True):
        own = len((await serving.client.prefill(instructions[name])).handle.prefix_tokens)
        follows = own - shared + len(handle.generation_prompt_tokens)
        assert usage.prompt_tokens == shared + follows
        # Only the first is charged with the prefill. What a busy store was too late for is computed, and told.
        told = f"{name}: {usage.computed_tokens} computed, {follows} follow what is shared; {usage.store_misses}"
        if name == "asked" or "timeout" in usage.store_misses:
            assert usage.computed_tokens > follows, told
        else:
            assert usage.computed_tokens == follows, told
    alone = [await run(serving, instructions[name], "judging") for name in names]
    by_itself = await run(serving, messages, "asked", parameters={"what": "deep"})
    assert by_itself.result == results[0].result  # type: ignore[union-attr]
    assert alone[2].result == results[2].result  # type: ignore[union-attr]


async def test_results_come_by_index_and_one_failure_disturbs_no_other(serving: Deployed) -> None:
    names = ["judging", "unknown", "guard", "broken", "cut", "asked", "plain", "unfit", "extreme", "also"]
    stream = serving.client.run_intrinsics(conversation("failing sea"), names)
    seen = [index async for index, _ in stream]
    assert sorted(seen) == list(range(len(names)))
    outcomes = await stream.results()
    expected: list[type[object]] = [
        IntrinsicResult,
        AdapterNotFoundError,
        IntrinsicUndefinedError,
        AdapterRefusedError,
        IntrinsicOutputError,
        InvalidRequestError,
        IntrinsicResult,
        AdapterRefusedError,
        AdapterRefusedError,
        IntrinsicResult,
    ]
    assert [type(outcome) for outcome in outcomes] == expected
    problems = [str(outcome) if isinstance(outcome, AloraServeError) else "" for outcome in outcomes]
    assert "io.yaml has colour" in problems[3]
    assert "cut off after 2 tokens; raise parameters.max_completion_tokens" in problems[4]
    assert "parameters.what is missing" in problems[5]
    assert "response_format or parameters of its io.yaml" in problems[7]
    assert "io.yaml: sampling.repetition_penalty: 200" in problems[8]


async def test_a_conversation_that_cannot_be_prefilled_fails_the_call(serving: Deployed) -> None:
    with pytest.raises(InvalidRequestError):
        await serving.client.run_intrinsics([ChatMessage("user", "long " * 3000)], ["judging", "also"]).results()


async def test_sentences_of_documents_are_tagged_and_looked_up_where_the_template_has_no_place_for_them(
    serving: Deployed,
) -> None:
    found = await run(serving, conversation("cited sea"), "cites", documents=DOCUMENTS)
    (cited,) = json.loads(found.raw_text)
    texts = ["The sea is deep. ", "It is salt.", "Ships go over it."]
    documents = ["sea", "sea", "2"]
    number = cited["s"]
    assert found.result == [{"s": number, "text": texts[number], "document": documents[number]}]
    assert found.probabilities == {}


async def test_a_handle_is_judged_as_its_messages_are(serving: Deployed) -> None:
    messages = conversation("handled sea")
    handle = (await serving.client.prefill(messages)).handle
    for name, parameters in (("judging", None), ("asked", {"what": "wet"})):
        by_messages = await run(serving, messages, name, parameters=parameters)
        by_handle = await run(serving, None, name, parameters=parameters, handle=handle)
        assert by_handle.result == by_messages.result
        assert by_handle.usage.prompt_tokens == by_messages.usage.prompt_tokens


async def test_what_is_wrong_with_a_request_is_named(serving: Deployed) -> None:
    messages = conversation("wrong sea")
    client = serving.client
    with pytest.raises(AdapterNotFoundError, match="judging"):
        await run(serving, messages, "judgin")
    with pytest.raises(IntrinsicUndefinedError, match="'guard'"):
        await run(serving, messages, "guard")
    with pytest.raises(AdapterRefusedError, match="colour"):
        await run(serving, messages, "broken")
    with pytest.raises(IntrinsicOutputError, match="cut off"):
        await run(serving, messages, "cut")
    forged = PrefixHandle(**{**_fields((await client.prefill(messages)).handle), "last_role": "assistant!"})
    with pytest.raises(HandleInvalidError):
        await run(serving, None, "judging", handle=forged)
    for call, field in (
        (run(serving, messages, ""), "intrinsic"),
        (run(serving, messages, "judging", parameters={"what": 1}), "parameters.what"),
        (run(serving, messages, "asked", parameters={"what": [1]}), "parameters.what"),
        (run(serving, None, "judging", token_ids=[1, 2]), "prompt.token_ids"),
        (run(serving, [], "judging"), "prompt"),
        (client.run_intrinsics(messages, []).results(), "intrinsics"),
        (client.run_intrinsics(messages, ["judging", ""]).results(), "intrinsics[1]"),
        (client.run_intrinsics(messages, ["judging"], parameters={"x": 1}).results(), "parameters.x"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            await call
        assert [violation.field for violation in refused.value.violations] == [field]


def _fields(handle: PrefixHandle) -> dict[str, Any]:
    return {name: getattr(handle, name) for name in PrefixHandle.__slots__}


async def test_listings_tell_intrinsics_and_a_changed_definition_counts_from_then_on(serving: Deployed) -> None:
    digests = {adapter.name: adapter.intrinsic_digest for adapter in await serving.client.list_adapters()}
    assert not digests["guard"]
    assert len({digests[name] for name in ("asked", "also", "judging", "cites")}) == 4
    assert not (await serving.client.get_model()).takes_documents
    file = Path(serving.model.roots[0]) / "also" / "io.yaml"
    messages = conversation("changed sea")
    assert (await run(serving, messages, "also")).result.keys() == {"likelihood"}
    file.write_text(DEFINITIONS["also"].replace("field_name: likelihood", "field_name: other"))
    try:
        await serving.client.load_adapter("also")
        async with asyncio.timeout(30):
            # The router learns of the change by the worker's status.
            while (await run(serving, messages, "also")).result.keys() != {"other"}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        file.write_text(DEFINITIONS["also"])


async def test_the_command_line_shows_results_and_failures(serving: Deployed) -> None:
    async def invoke(*arguments: str) -> Result:
        address = ("--address", serving.local.router_address)
        return await asyncio.to_thread(CliRunner().invoke, app, ["intrinsic", *arguments, *address])

    def printed(result: Result) -> Any:
        # What the services log meanwhile goes to the same place.
        return next(json.loads(line) for line in result.stdout.splitlines() if line.startswith("[{"))

    answered = await invoke("judging", "asked", "-m", "The sea is salt.", "-p", "what=deep = wet", "--json")
    assert answered.exit_code == 0
    results = printed(answered)
    assert [result["intrinsic"] for result in results] == ["judging", "asked"]
    for result in results:
        assert result["result"].keys() == {"likelihood"}
        assert sum(result["probabilities"][""].values()) == pytest.approx(1)
        assert result["usage"]["generated_tokens"] > 0
    shown = await invoke("judging", "guard", "-m", "The sea is salt.")
    assert shown.exit_code == 1
    assert "likelihood" in shown.stdout
    assert "io.yaml" in shown.stdout
    failed = await invoke("guard", "-m", "The sea is salt.", "--json")
    assert (failed.exit_code, printed(failed)[0]["error"]["reason"]) == (1, IntrinsicUndefinedError.reason)
    wrong = await invoke("asked", "-m", "The sea is salt.", "-p", "what")
    assert (wrong.exit_code, "is not NAME=VALUE" in " ".join(wrong.output.split())) == (1, True)


async def test_an_old_ibm_adapter_answers_as_peft_does_from_one_token_later(serving: Deployed) -> None:
    handle = (await serving.client.prefill(conversation("old sea"))).handle
    answer = await serving.ask(handle, "old")
    model, start = serving.model, len(handle.prefix_tokens)
    prompt = handle.prefix_tokens + tokens_of(OLD_INVOCATION, model.directory)
    reference = load_peft(model.directory, model.roots[0].parent / "peft" / "old")
    assert answer.token_ids == greedy(reference, prompt, ANSWER_TOKENS).tokens
    assert answer.usage.invocation_start == start + 1
    assert answer.usage.prompt_tokens == len(prompt)
    # On from the first token, and without the first token, it would say something else.
    early = load_peft(model.directory, model.roots[0].parent / "peft" / "old")
    early.peft_config["default"].alora_invocation_tokens = list(tokens_of(OLD_INVOCATION, model.directory))
    assert greedy(early, prompt, ANSWER_TOKENS).tokens != answer.token_ids
    shortened = handle.prefix_tokens + prompt[start + 1 :]
    assert greedy(reference, shortened, ANSWER_TOKENS).tokens != answer.token_ids
    invoked = await serving.client.generate(token_ids=prompt, adapter="old", sampling=GREEDY).result()
    assert invoked.token_ids == answer.token_ids
