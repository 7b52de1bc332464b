"""What a real worker tells those who spread requests over workers and do not know our status stream: vLLM's metrics, as
the Gateway API Inference Extension reads them, and ORCA load reports, as Envoy does."""

from __future__ import annotations

import asyncio
import base64
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToJson
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from alora_serve.rpc.convert import decode_to_proto
from alora_serve.rpc.load_reports import LOAD_REPORT_KEY
from alora_serve.types import GenerateRequest
from alora_serve.v1.load_report_pb2 import LoadReport
from deployment import BATCH, GREEDY, PATIENCE_SECONDS, WORKER, Deployed, metrics_page

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

LONG = 1900
"""Tokens that nobody here waits for."""
WAITING = 3
BUF = Path(sys.executable).parent / "buf"


@dataclass(frozen=True, slots=True)
class Page:
    """A worker's ``/metrics`` at one moment."""

    samples: list[Sample]

    @classmethod
    async def of(cls, running: Deployed) -> Page:
        text = await asyncio.to_thread(metrics_page, running.local.processes[WORKER].metrics_address)
        families = text_string_to_metric_families(text)
        return cls([sample for family in families for sample in family.samples])

    def only(self, name: str) -> Sample:
        [sample] = [sample for sample in self.samples if sample.name == name]
        return sample

    def loaded(self) -> dict[str, str]:
        """Digests by name of the adapters that it says are in memory."""
        loaded = [sample for sample in self.samples if sample.name == "alora_adapter_loaded"]
        assert {sample.value for sample in loaded} <= {1.0}
        return {sample.labels["adapter"]: sample.labels["digest"] for sample in loaded}


async def call(running: Deployed, method: str, request: str) -> LoadReport:
    """The report that comes with the end of a call, as an HTTP/2 client sees it: gRPC keeps it from Python."""
    url = f"http://{running.local.processes[WORKER].address}/alora_serve.v1.AdapterDecodeService/{method}"
    command = (str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--verbose", "--data", "@-", url)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(PATIENCE_SECONDS):
        _, told = await process.communicate(request.encode())
    assert process.returncode == 0, told.decode()
    values = re.findall(rf"{LOAD_REPORT_KEY}: (\S+)", told.decode(), re.IGNORECASE)
    assert values, told.decode()
    value = values[-1]
    return LoadReport.FromString(base64.b64decode(value + "=" * (-len(value) % 4)))


@asynccontextmanager
async def busy(running: Deployed) -> AsyncIterator[None]:
    """A full batch of one adapter, and some of another who wait for a place."""
    handle = (await running.client.prefill("Who is busy?")).handle
    async with AsyncExitStack() as leaving:
        for adapter, count in (("guard", BATCH), ("answer", WAITING)):
            for _ in range(count):
                call = running.client.generate(handle=handle, adapter=adapter, max_tokens=LONG, ignore_eos=True)
                stream = await leaving.enter_async_context(call)
                await anext(stream)
            await running.wait_for_load(running=BATCH, queued=count if adapter == "answer" else 0)
        yield
    await running.wait_for_load(running=0)


async def test_a_worker_under_known_load_says_so_under_vllms_names(tiny: Deployed) -> None:
    model = (await tiny.client.get_model()).name
    async with busy(tiny):
        before = time.time()
        page = await Page.of(tiny)
        assert page.only("vllm:num_requests_running").value == BATCH
        assert page.only("vllm:num_requests_waiting").value == WAITING
        assert 0 < page.only("vllm:kv_cache_usage_perc").value <= 1
        assert page.only("vllm:num_requests_running").labels == {"model_name": model}
        info = page.only("vllm:lora_requests_info")
        assert info.labels == {
            "max_lora": str(BATCH),
            "running_lora_adapters": "guard",
            "waiting_lora_adapters": "answer",
        }
        assert before - 1 < info.value <= time.time() + 1
        assert page.only("alora_engine_queued_prefill_tokens").value >= WAITING, "the invocations of those who wait"
        assert page.loaded().keys() >= {"guard", "answer"}
    page = await Page.of(tiny)
    assert page.only("vllm:num_requests_running").value == page.only("vllm:num_requests_waiting").value == 0
    idle = page.only("vllm:lora_requests_info").labels
    assert idle == {"max_lora": str(BATCH), "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert page.only("alora_engine_queued_prefill_tokens").value == 0
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await Page.of(tiny)).only("vllm:kv_cache_usage_perc").value:  # what is being stored is in use
            pass
    assert (await Page.of(tiny)).only("alora_prefix_bytes").value > 0, "resident all the same"


async def test_which_adapters_are_in_memory_is_told_by_digest(tiny: Deployed) -> None:
    digest = (await tiny.client.load_adapter("plain")).digest
    assert (await Page.of(tiny)).loaded()["plain"] == digest
    await tiny.client.unload_adapter("plain")
    assert "plain" not in (await Page.of(tiny)).loaded()


async def test_the_end_of_a_stream_and_of_a_unary_call_carries_a_load_report(tiny: Deployed) -> None:
    handle = (await tiny.client.prefill("Who is idle?")).handle
    decode = MessageToJson(decode_to_proto(GenerateRequest(handle, "guard", GREEDY)))
    for method, request in (("Decode", decode), ("ListAdapters", "{}")):
        report = await call(tiny, method, request)
        assert report.application_utilization == 1 / BATCH, "itself alone"
        assert report.rps_fractional > 0
        assert report.named_metrics["num_requests_running"] == report.named_metrics["num_requests_waiting"] == 0
    async with busy(tiny):
        report = await call(tiny, "ListAdapters", "{}")
        assert report.application_utilization == (BATCH + WAITING + 1) / BATCH
        assert report.named_metrics["num_requests_running"] == BATCH
        assert report.named_metrics["num_requests_waiting"] == WAITING
        assert report.named_metrics["queued_prefill_tokens"] >= WAITING
        assert 0 < report.named_metrics["kv_cache_usage_perc"] <= 1
