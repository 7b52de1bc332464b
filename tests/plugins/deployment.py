"""Deployments of the real processes, the models they serve, and what a cold run of stock PEFT says to a prompt."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import grpc
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

import warm_starts
from alora_serve.cli.local import DeploymentOptions, LocalDeployment, machine
from alora_serve.cli.local.events import Listening
from alora_serve.cli.local.process import ProcessSpec, RestartPolicy, SupervisedProcess
from alora_serve.client import AsyncClient, GenerationResult, PrefixHandle, RetryPolicy, SamplingParams
from alora_serve.rpc.channels import internal_channel, public_options
from alora_serve.rpc.convert import endpoint_status_from_proto
from alora_serve.types import EndpointStatus
from alora_serve.v1.adapter_decode_pb2 import AdapterDecodeServiceWatchStatusRequest
from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceStub
from alora_serve.v1.alora_pb2_grpc import AloraServiceStub
from tiny_models import FAMILIES, MODERATE, greedy, load_peft, save_adapter, save_model

ANSWER_TOKENS = 10
GREEDY = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
BLOCK_TOKENS = 16
BATCH, QUEUE = 8, 100
"""Places of the tiny deployment's engines."""
TINY_CONTEXT_TOKENS = 2048
PATIENCE_SECONDS = 60.0
SECRET = "one secret for all deployments of a test"
SALT = "the salt of these deployments"
WORKER = "worker-1"
FETCHING = {"always_fetch": "true"}
YES_OR_NO = """
model: ~
response_format: '{"type": "string", "enum": ["yes", "no"]}'
transformations:
  - {type: likelihood, input_path: [], categories_to_values: {yes: 1.0, no: 0.0}}
  - {type: nest, input_path: [], field_name: likelihood}
"""
"""What makes an adapter an intrinsic: how likely its answer is yes."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with an adapter of each kind.

    Attributes:
        roots: directories of adapters.
        appended: an aLoRA whose invocation is appended to the conversation.
        answering: an aLoRA whose invocation is the generation prompt.
        plain: a plain LoRA.
        invocation_texts: invocations of the two aLoRAs by name.
    """

    directory: Path
    roots: tuple[Path, ...]
    appended: str
    answering: str
    plain: str
    invocation_texts: Mapping[str, str]

    @property
    def invocations(self) -> dict[str, tuple[int, ...]]:
        """The tokens of the two aLoRAs' invocations by name."""
        return {name: tokens_of(text, self.directory) for name, text in self.invocation_texts.items()}

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(_tokenizer(self.directory).all_special_ids)

    def suffix(self, handle: PrefixHandle, adapter: str) -> tuple[int, ...]:
        """What follows a closed conversation when an adapter, or the base model, is asked."""
        return self.invocations[adapter] if adapter == self.appended else handle.generation_prompt_tokens

    def prompt(self, handle: PrefixHandle, adapter: str) -> tuple[int, ...]:
        """All tokens that PEFT must be given to be asked the same."""
        return handle.prefix_tokens + self.suffix(handle, adapter)

    def cold_answers(
        self, asked: Sequence[tuple[str, tuple[int, ...]]], count: int = ANSWER_TOKENS
    ) -> list[tuple[int, ...]]:
        """What stock PEFT generates in fp32, greedily, from nothing, for each adapter (``""``: none) and prompt."""
        answers: dict[int, tuple[int, ...]] = {}
        for name in {adapter for adapter, _ in asked}:
            path = next(root / name for root in self.roots if (root / name).is_dir()) if name else None
            model = load_peft(self.directory, path)  # one in memory at a time: they take half a GB on the real model
            answers |= {
                at: greedy(model, prompt, count).tokens for at, (adapter, prompt) in enumerate(asked) if adapter == name
            }
        return [answers[at] for at in range(len(asked))]

    def cold_tokens(self, adapter: str, prompt: tuple[int, ...], count: int = ANSWER_TOKENS) -> tuple[int, ...]:
        """What stock PEFT generates for one prompt: see :meth:`cold_answers`."""
        return self.cold_answers([(adapter, prompt)], count)[0]


def save_tiny_model(
    root: Path, *, seed: int = 0, context_tokens: int = TINY_CONTEXT_TOKENS, is_moderate: bool = False
) -> ServedModel:
    """A seeded tiny Llama and its adapters, in milliseconds; the answering one is an intrinsic.

    One that is moderate magnifies rounding so little that the τ rule tells right from wrong in bfloat16.
    """
    config = FAMILIES["llama"]()
    config.max_position_embeddings = context_tokens
    directory = save_model(root / "tiny-llama", config, seed=seed, **(MODERATE if is_moderate else {}))
    strength = {"lora_alpha": 12 if is_moderate else 32, "target_modules": "all-linear"}
    invocations = {"guard": "<|guard|>\n<|guard|>", "answer": "<|start|>assistant\n"}
    adapters = root / "adapters"
    for number, (name, invocation) in enumerate(invocations.items()):
        tokens = list(tokens_of(invocation, directory))
        save_adapter(directory, adapters / name, seed=number, alora_invocation_tokens=tokens, **strength)
    save_adapter(directory, adapters / "plain", seed=9, **strength)
    (adapters / "answer" / "io.yaml").write_text(YES_OR_NO)
    return ServedModel(directory, (adapters,), "guard", "answer", "plain", invocations)


def save_smollm2_adapters(directory: Path, examples: Path, root: Path) -> ServedModel:
    """SmolLM2 with the trained adapters of the examples, and a random one that the generation prompt invokes and
    nothing defines."""
    invocations = {"jailbreak": "<|im_start|>jailbreak<|im_end|>", "answer": "<|im_start|>assistant\n"}
    answering = list(tokens_of(invocations["answer"], directory))
    settings = {"target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": answering}
    save_adapter(directory, root / "answer", seed=0, **settings)
    return ServedModel(directory, (examples, root), "jailbreak", "answer", "jailbreak-lora", invocations)


def tokens_of(text: str, directory: Path) -> tuple[int, ...]:
    """Special tokens of a model's own, as its template writes them."""
    return tuple(_tokenizer(directory).encode(text, add_special_tokens=False))


@lru_cache
def _tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@dataclass(frozen=True, slots=True)
class Deployed:
    """A running deployment and ways to look at it.

    Attributes:
        client: never calls again by itself: what a test provokes, it must see.
        stub: the raw stub of the router.
    """

    model: ServedModel
    local: LocalDeployment
    client: AsyncClient
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return AloraServiceStub(self.channel)

    def another_client(self) -> AsyncClient:
        """On a connection of its own."""
        return AsyncClient(self.local.router_address, retry=RetryPolicy(max_attempts=1))

    async def ask(self, handle: PrefixHandle, adapter: str = "", **more: Any) -> GenerationResult:
        """A greedy answer of :data:`ANSWER_TOKENS` on a conversation named by its handle."""
        return await self.client.generate(handle=handle, adapter=adapter, sampling=GREEDY, **more).result()

    async def metric(self, process: str, name: str, **labels: str) -> float:
        """A sample of a process's ``/metrics``, summed over what ``labels`` leave open; 0 while there is none.

        Of a process that was killed, it is the next one's, as soon as that listens.
        """
        return await metric_at((await self.local.wait_listening(process)).metrics_address, name, **labels)

    async def statuses(self, process: str = WORKER) -> AsyncIterator[EndpointStatus]:
        """What a decode worker tells routers, from now on."""
        async with internal_channel((await self.local.wait_listening(process)).address) as channel:
            stub: Any = AdapterDecodeServiceStub(channel)
            async for response in stub.WatchStatus(AdapterDecodeServiceWatchStatusRequest()):
                yield endpoint_status_from_proto(response.status)

    async def wait_for_load(self, *, running: int, queued: int = 0, process: str = WORKER) -> None:
        """Return once a worker has so many sequences in its batch and its queue."""
        async with asyncio.timeout(PATIENCE_SECONDS), aclosing(self.statuses(process)) as statuses:  # type: ignore[type-var]
            async for status in statuses:
                if (status.running, status.queued) == (running, queued):
                    return


async def until_reused(client: AsyncClient, handle: PrefixHandle, adapter: str) -> None:
    """Ask until KV is not computed again: on a busy machine, a store may be taken for slow or away at first."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (  # noqa: ASYNC110  # asked over the network
            await client.generate(handle=handle, adapter=adapter, sampling=GREEDY).result()
        ).usage.cached_tokens:
            await asyncio.sleep(1)


async def metric_at(metrics_address: str, name: str, **labels: str) -> float:
    """A sample of a ``/metrics`` page, summed over what ``labels`` leave open; 0 while there is none."""
    page = await asyncio.to_thread(metrics_page, metrics_address)
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def metrics_page(metrics_address: str) -> str:
    with urlopen(f"http://{metrics_address}/metrics", timeout=PATIENCE_SECONDS) as page:
        text: str = page.read().decode()
    return text


@asynccontextmanager
async def deployed(
    model: ServedModel,
    store_url: str,
    *,
    workers: int = 1,
    prefills: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    drain_seconds: float = 5,
    policy: RestartPolicy | None = None,
    emit: Callable[[object], None] = print,
    credentials: grpc.ChannelCredentials | None = None,
    api_key: str | None = None,
    **settings: str,
) -> AsyncIterator[Deployed]:
    """All services on a model, unset in fp32, where tokens are promised equal, with one torch thread a process.

    What is stored is always fetched: how fast this machine computes just now must not decide what a test sees.
    ``credentials`` and ``api_key`` are the client's, where the settings ask for them.
    """
    options = DeploymentOptions(
        workers=workers,
        prefills=prefills,
        model=str(model.directory),
        adapter_roots=model.roots,
        store_url=store_url,
        dtype=dtype,
        threads=1,
        drain_seconds=drain_seconds,
        settings={"handle_secrets": SECRET, "tenant_salt": SALT, "store_budget_bytes": "64MiB", **FETCHING, **settings},
    )
    # What the services log is shown with a test that fails.
    async with (
        LocalDeployment(options, emit=emit, policy=policy, spawn=warm_starts.spawn) as local,
        AsyncClient(
            local.router_address, retry=RetryPolicy(max_attempts=1), credentials=credentials, api_key=api_key
        ) as client,
        grpc.aio.insecure_channel(local.router_address, public_options(local.router_address)) as channel,
    ):
        yield Deployed(model, local, client, channel)


@asynccontextmanager
async def another_router(
    prefills: Sequence[str],
    workers: Sequence[str],
    emit: Callable[[object], None] = print,
    policy: RestartPolicy | None = None,
    **settings: str,
) -> AsyncIterator[Listening]:
    """A router of a deployment's own kind in front of these addresses."""
    chosen = {
        "handle_secrets": SECRET,
        "tenant_salt": SALT,
        "base_prefill_endpoints": ",".join(prefills),
        "decode_endpoints": ",".join(workers),
        **settings,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
    environment |= {f"ALORA_{name.upper()}": value for name, value in chosen.items()}
    environment = machine.service_environment(environment, threads=1)
    spec = ProcessSpec("router", (sys.executable, "-P", "-m", "adapter_router"), environment)
    router = SupervisedProcess(spec, emit, policy, warm_starts.spawn)
    try:
        yield await router.start()
    finally:
        await router.stop(PATIENCE_SECONDS)


@asynccontextmanager
async def lone_router(*, prefill: str) -> AsyncIterator[str]:
    """The address of a router that has a base prefill, and a decode worker at a port where nobody listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # held, but never listened at
        async with another_router([prefill], [f"127.0.0.1:{nobody.getsockname()[1]}"]) as router:
            yield router.address
