r"""Makes the data of the uncertainty intrinsic: is the base model's own answer right?

Each question of ``DIR/uncertainty/{train,test}.jsonl`` is put to the base model, greedily, through the engine in this
process, many at once. The answer is scored against the gold answers after SQuAD's normalisation: 1 where they are equal
or one is contained in the answer, otherwise the best F1 of their words. Scores of at least ``--threshold`` are
``certain``, others ``uncertain``. The rows written hold the conversation with the model's answer as its last turn::

    python examples/prepare_uncertainty.py --data DIR --output build/data/uncertainty

What is there already is not asked again, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alora_serve.engine.answer import Answer
from alora_serve.engine.bridge import run_sequence
from alora_serve.engine.engine import Engine
from alora_serve.engine.events import BaseComputed, SequenceDone
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.sequence_request import SequenceRequest
from alora_serve.engine.stepper import EngineLimits
from alora_serve.intrinsics import with_documents_placed
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.metrics import CoreMetrics
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.kv_memory import Prefix
from alora_serve.model.loader import load_base_model
from alora_serve.model.source import resolve_model
from alora_serve.model.text import TextStream
from alora_serve.types import ChatMessage, Document, Prompt, SamplingParams, TokenChunk, TokenIds

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CACHE_BYTES = 1 << 28
_BLOCK_TOKENS = 64


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds uncertainty/")
    parser.add_argument("--output", type=Path, default=Path("build/data/uncertainty"))
    parser.add_argument("--model", default="demo", help="a local directory, a hub id, or demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0 leaves its own choice")
    parser.add_argument("--together", type=int, default=32, help="questions in the engine at a time")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a certain answer")
    parser.add_argument("--limit", type=int, help="ask at most this many questions of each file")
    return parser.parse_args(argv)


def normalized(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def score(answer: str, gold_answers: Iterable[str]) -> float:
    """How right an answer is, from 0 to 1: see the module."""
    said = normalized(answer)
    best = 0.0
    for gold in map(normalized, gold_answers):
        if not gold:
            continue
        if f" {' '.join(gold)} " in f" {' '.join(said)} ":
            return 1.0
        shared = sum((Counter(gold) & Counter(said)).values())
        best = max(best, 2 * shared / (len(gold) + len(said)))
    return best


def labelled(record: dict[str, Any], answer: str, threshold: float) -> dict[str, Any]:
    """A row to train on, out of a question and the model's answer."""
    found = score(answer, record["target"]["answers"])
    return {
        "id": record["id"],
        "source": record["source"],
        "messages": [*record["messages"], {"role": "assistant", "content": answer}],
        "documents": record["documents"],
        "target": "certain" if found >= threshold else "uncertain",
        "score": round(found, 4),
    }


def prompt_tokens(tokenizer: ChatTokenizer, conversation: Prompt) -> TokenIds:
    """The conversation as the services show it to the base model, documents included."""
    asked = with_documents_placed(conversation, template_takes_documents=tokenizer.takes_documents)
    rendered = tokenizer.render(asked.messages, documents=asked.documents)
    return rendered.prefix_tokens + rendered.generation_prompt_tokens


class Answerer:
    """The base model, asked many questions at once."""

    def __init__(self, model: str, dtype: str, together: int, max_tokens: int) -> None:
        self._model = load_base_model(resolve_model(model), dtype=dtype)
        metrics = CoreMetrics(CollectorRegistry())
        self._cache = PrefixCache(
            self._model.layout, budget_bytes=_CACHE_BYTES, device=self._model.device, metrics=metrics
        )
        limits = EngineLimits(max_sequences=together, max_queue=together)
        self._engine = Engine(self._model, self._cache, limits=limits, metrics=metrics)
        self._places = asyncio.Semaphore(together)
        self._sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)

    async def answer(self, messages: list[dict[str, str]], documents: list[dict[str, str]]) -> str:
        """The greedy answer; waits for a place."""
        conversation = Prompt(
            messages=tuple(ChatMessage(message["role"], message["content"]) for message in messages),
            documents=tuple(Document(document["title"], document["text"]) for document in documents),
        )
        tokenizer = self._model.tokenizer
        prompt = prompt_tokens(tokenizer, conversation)
        request = SequenceRequest(
            prompt=prompt,
            prefix=Prefix(),
            chain=BlockChain(BlockHash(bytes(32)), prompt, _BLOCK_TOKENS),
            sampling=self._sampling,
            answer=Answer(TextStream(tokenizer.decode, ()), self._sampling.most_tokens, tokenizer.end_of_sequence_ids),
        )
        text = ""
        async with self._places, run_sequence(self._engine, request) as running:
            async for event in running:
                match event:
                    case TokenChunk() | SequenceDone():
                        text += event.text
                    case BaseComputed():
                        self._cache.release(event.prefix)
        return text.strip()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()
        self._cache.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:  # splitlines() would part texts, too
        return [json.loads(line) for line in lines]


async def prepare(answerer: Answerer, source: Path, target: Path, arguments: argparse.Namespace) -> Counter[str]:
    """Answer and label the questions of one file, in order; returns how many have which label."""
    records, done = read_lines(source)[: arguments.limit], read_lines(target)
    labels = Counter(row["target"] for row in done)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, target.open("a", encoding="utf-8") as out:
        task = bar.add_task(source.name, total=len(records), completed=len(done))
        rest = records[len(done) :]
        for start in range(0, len(rest), 4 * arguments.together):
            group = rest[start : start + 4 * arguments.together]
            answers = await asyncio.gather(*(answerer.answer(r["messages"], r["documents"]) for r in group))
            for record, answer in zip(group, answers, strict=True):
                row = labelled(record, answer, arguments.threshold)
                labels[row["target"]] += 1
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            bar.advance(task, len(group))
    return labels


async def main(argv: list[str] | None = None) -> None:
    """Prepare both files."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    answerer = Answerer(arguments.model, arguments.dtype, arguments.together, arguments.max_tokens)
    try:
        for name in ("train.jsonl", "test.jsonl"):
            source = arguments.data / "uncertainty" / name
            labels = await prepare(answerer, source, arguments.output / name, arguments)
            print(f"{arguments.output / name}: {dict(labels)}")
    finally:
        answerer.close()


if __name__ == "__main__":
    asyncio.run(main())
