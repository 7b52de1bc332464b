"""A small deployment of the real processes on a tiny model, and what a cold run of the same prompt says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from alora_serve.cli.local import DeploymentOptions, LocalDeployment
from alora_serve.client import AsyncClient, GenerationResult, PrefixHandle
from tiny_models import FAMILIES, peft_generate, save_adapter, save_model

GUARD = (258, 10, 258)
ANSWER_TOKENS = 10
SECRET = "one secret for all deployments of a test"
PLAIN_LORA = "plain"


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model directory and adapters on it: ``guard`` (invocation appended), ``answer`` (it is the generation prompt),
    and the plain LoRA ``plain``."""

    directory: Path
    adapters: Path
    invocations: dict[str, tuple[int, ...]]

    def cold_tokens(self, adapter: str, prompt: tuple[int, ...], count: int = ANSWER_TOKENS) -> tuple[int, ...]:
        """What stock PEFT generates for a prompt, greedily, from nothing."""
        path = self.adapters / adapter if adapter else None
        return peft_generate(self.directory, path, prompt, count).tokens

    def prompt(self, handle: PrefixHandle, adapter: str) -> tuple[int, ...]:
        """The prompt that an adapter is asked on a closed conversation."""
        if adapter == "guard":
            return handle.prefix_tokens + GUARD
        return handle.prefix_tokens + handle.generation_prompt_tokens


def save_tiny_model(root: Path) -> TinyModel:
    """A tiny Llama and its adapters."""
    directory = save_model(root / "tiny-llama", FAMILIES["llama"]())
    answer = tuple(b"assistant\n")
    invocations = {"guard": GUARD, "answer": _tokens_of("<|start|>assistant\n", directory)}
    assert len(invocations["answer"]) == len(answer) + 1
    for seed, (name, invocation) in enumerate(invocations.items()):
        settings = {"target_modules": "all-linear", "alora_invocation_tokens": list(invocation)}
        save_adapter(directory, root / "adapters" / name, seed=seed, **settings)
    save_adapter(directory, root / "adapters" / PLAIN_LORA, seed=9, target_modules="all-linear")
    return TinyModel(directory, root / "adapters", invocations)


def _tokens_of(text: str, directory: Path) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    return tuple(AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False))


def options(model: TinyModel, store_url: str, **settings: str) -> DeploymentOptions:
    """Options of a deployment in fp32, where tokens are promised equal, with one torch thread a process."""
    return DeploymentOptions(
        model=str(model.directory),
        adapter_roots=(model.adapters,),
        store_url=store_url,
        dtype="float32",
        threads=1,
        drain_seconds=5,
        settings={"handle_secrets": SECRET, "store_budget_bytes": "64MiB", "block_tokens": "16", **settings},
    )


@asynccontextmanager
async def deployed(chosen: DeploymentOptions) -> AsyncIterator[tuple[LocalDeployment, AsyncClient]]:
    """A running deployment and a client of it."""
    async with LocalDeployment(chosen) as deployment, AsyncClient(deployment.router_address) as client:
        yield deployment, client


async def ask(client: AsyncClient, handle: PrefixHandle, adapter: str = "") -> GenerationResult:
    """Greedy tokens on a conversation named by its handle."""
    stream = client.generate(handle=handle, adapter=adapter, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    return await stream.result()
