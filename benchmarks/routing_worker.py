"""A decode worker in the routing simulation: its adapters, resident prefixes, fetches and batch, with their times."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice

from routing_traffic import MODEL_DIGEST, Request

from alora_serve.engine.rates import RecentMean, RecentSpeed
from alora_serve.kv.fingerprints import MAX_FINGERPRINTS, STRIDE_TOKENS
from alora_serve.types import EndpointStatus, ModelInfo, PrefixDigest


@dataclass(frozen=True)
class Speeds:
    """How fast a worker is. The defaults are SmolLM2-135M in bf16 on two cores, as the engine's prototype measured it.

    Attributes:
        step_seconds: a step, before anything runs in it.
        row_seconds: each token that runs in it, of an answer or of a prompt.
        prefix_token_seconds: a step's attention, for each token of each prefix in the batch.
        shared_token_seconds: the same for each further sequence on one prefix.
        fetch_bytes_per_second: from the store, one fetch after another.
        fetch_latency_seconds: of a fetch, however small.
        adapter_load_seconds: reading one adapter.
        kv_bytes_per_token: of base KV.
        places: sequences in the batch.
        suffix_tokens: invocation and generation prompt, computed for each request.
        answer_tokens: generated for each request.
        adapter_slots: adapters that fit memory.
        prefix_cache_bytes: base KV that fits memory.
    """

    step_seconds: float = 0.033
    row_seconds: float = 0.00125
    prefix_token_seconds: float = 3.3e-6
    shared_token_seconds: float = 0.44e-6
    fetch_bytes_per_second: float = 2e9
    fetch_latency_seconds: float = 0.002
    adapter_load_seconds: float = 0.050
    kv_bytes_per_token: int = 23040
    places: int = 16
    suffix_tokens: int = 8
    answer_tokens: int = 16
    adapter_slots: int = 32
    prefix_cache_bytes: int = 1 << 30

    def step(self, batch: Iterable[Request], rows: int) -> float:
        """Time of a step that runs so many tokens of these requests' sequences."""
        attention, seen = 0.0, set[int]()
        for request in batch:
            first = request.conversation.number not in seen
            seen.add(request.conversation.number)
            attention += request.prefix_tokens * (self.prefix_token_seconds if first else self.shared_token_seconds)
        return self.step_seconds + rows * self.row_seconds + attention

    def requests_a_second(self, prefix_tokens: int) -> float:
        """Most that one worker answers with a full batch, each on a prefix of its own, everything in memory."""
        attention = self.places * prefix_tokens * self.prefix_token_seconds
        steps = self.answer_tokens * (self.step_seconds + self.places * self.row_seconds + attention)
        return self.places / (steps + self.places * self.suffix_tokens * self.row_seconds)


@dataclass(slots=True)
class Running:
    """A sequence in the batch; ``left`` tokens of its answer, the first of which has not come while ``fresh``."""

    request: Request
    joined: float
    left: int
    fresh: bool = True


@dataclass(slots=True)
class _Segment:
    tokens: int = 0
    ready: float = 0.0
    fingerprints: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Worker:
    """State of one worker. Times are the simulation's; whoever calls keeps the clock."""

    speeds: Speeds
    adapters: OrderedDict[str, float] = field(default_factory=OrderedDict)
    prefixes: OrderedDict[Hashable, _Segment] = field(default_factory=OrderedDict)
    running: list[Running] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    loading: list[Request] = field(default_factory=list)
    fetching_until: float = 0.0
    step_ends: float | None = None
    loads: int = 0
    fetched_bytes: int = 0
    _prefix_tokens: int = 0
    _in_use: dict[str, int] = field(default_factory=dict)
    _rates: dict[str, RecentMean] = field(default_factory=lambda: {"step": RecentMean(), "sequence": RecentMean()})
    _fetches: RecentSpeed = field(default_factory=RecentSpeed)

    # --- a request comes ----------------------------------------------------------------------------------------------

    def accept(self, request: Request, now: float) -> float:
        """Load and fetch what the request lacks; when it can join the batch. As the decoder does: adapter first."""
        self.loading.append(request)
        ready = self._load_adapter(request.demand.adapter, now)
        return self._fetch_prefix(request, ready)

    def first_token(self, request: Request, now: float) -> float:
        """When its first token would come if it were sent now: what only an oracle knows. Changes nothing."""
        adapter = request.demand.adapter
        ready = max(now, self.adapters.get(adapter, now + self.speeds.adapter_load_seconds)) if adapter else now
        missing, there = self._missing(request)
        if missing:
            start = max(ready, self.fetching_until)
            ready = start + self._fetch_seconds(missing)
        ready = max(ready, there, self.step_ends or now)
        others = [*(sequence.request for sequence in self.running), *self.waiting, *self.loading]
        batch = others[: self.speeds.places - 1]
        step = self.speeds.step([*batch, request], len(batch) + self.speeds.suffix_tokens)
        ahead = max(0, len(others) + 1 - self.speeds.places)
        wait = ahead / self.speeds.places * self.speeds.answer_tokens * step
        return ready + wait + step

    @property
    def on_it(self) -> int:
        """Requests that it has accepted and not answered."""
        return len(self.running) + len(self.waiting) + len(self.loading)

    def ready(self, request: Request) -> None:
        """All that the request lacked is there: it waits for a place."""
        self.loading.remove(request)
        self.waiting.append(request)

    def _load_adapter(self, adapter: str, now: float) -> float:
        if not adapter:
            return now
        self._in_use[adapter] = self._in_use.get(adapter, 0) + 1
        if adapter not in self.adapters:
            self.loads += 1
            self.adapters[adapter] = now + self.speeds.adapter_load_seconds
        self.adapters.move_to_end(adapter)
        for name in list(self.adapters)[: max(0, len(self.adapters) - self.speeds.adapter_slots)]:
            if not self._in_use.get(name):
                del self.adapters[name]
        return max(now, self.adapters[adapter])

    def _missing(self, request: Request) -> tuple[int, float]:
        """Tokens of the prefix that are not in memory, and when those that are have come."""
        conversation = request.conversation
        system = self.prefixes.get(("system", conversation.system))
        if system is None:
            return request.prefix_tokens, 0.0
        own = self.prefixes.get(conversation.number)
        held = conversation.system_tokens + (own.tokens if own else 0)
        return max(0, request.prefix_tokens - held), max(system.ready, own.ready if own else 0.0)

    def _fetch_seconds(self, tokens: int) -> float:
        size = tokens * self.speeds.kv_bytes_per_token
        return self.speeds.fetch_latency_seconds + size / self.speeds.fetch_bytes_per_second

    def _fetch_prefix(self, request: Request, now: float) -> float:
        missing, ready = self._missing(request)
        ready = max(now, ready)
        if missing:
            size = missing * self.speeds.kv_bytes_per_token
            start = max(now, self.fetching_until)
            ready = self.fetching_until = start + self._fetch_seconds(missing)
            self.fetched_bytes += size
            self._fetches.observe(size, ready - now)
        conversation, shared = request.conversation, request.conversation.system_tokens
        strides = shared // STRIDE_TOKENS
        # The shared beginning is touched last, so that it outlives what follows it.
        own = _Segment(request.prefix_tokens - shared, ready, request.demand.fingerprints[strides:])
        self._keep(conversation.number, own)
        self._keep(("system", conversation.system), _Segment(shared, ready, request.demand.fingerprints[:strides]))
        budget = self.speeds.prefix_cache_bytes // self.speeds.kv_bytes_per_token
        while self._prefix_tokens > budget and len(self.prefixes) > 2:
            _, dropped = self.prefixes.popitem(last=False)
            self._prefix_tokens -= dropped.tokens
        return ready

    def _keep(self, name: Hashable, segment: _Segment) -> None:
        known = self.prefixes.get(name, _Segment())
        if segment.tokens > known.tokens:
            self._prefix_tokens += segment.tokens - known.tokens
            self.prefixes[name] = segment
        self.prefixes.move_to_end(name)

    # --- the batch ----------------------------------------------------------------------------------------------------

    def begin_step(self, now: float) -> None:
        """Take waiting sequences into the batch and run it, if there is any."""
        while self.waiting and len(self.running) < self.speeds.places:
            request = self.waiting.popleft()
            self.running.append(Running(request, now, request.answer_tokens))
        if not self.running:
            self.step_ends = None
            return
        fresh = sum(sequence.fresh for sequence in self.running)
        rows = len(self.running) - fresh + fresh * self.speeds.suffix_tokens
        self.step_ends = now + self.speeds.step((sequence.request for sequence in self.running), rows)
        if not fresh:
            self._rates["step"].observe(self.step_ends - now)

    def end_step(self, now: float) -> tuple[list[Request], list[Request]]:
        """Requests whose first token came with this step, and those that are done."""
        first = [sequence.request for sequence in self.running if sequence.fresh]
        for sequence in self.running:
            sequence.fresh = False
            sequence.left -= 1
        done = [sequence for sequence in self.running if sequence.left == 0]
        self.running = [sequence for sequence in self.running if sequence.left]
        for sequence in done:
            self._rates["sequence"].observe(now - sequence.joined)
            if adapter := sequence.request.demand.adapter:
                self._in_use[adapter] -= 1
        return first, [sequence.request for sequence in done]

    # --- what it says -------------------------------------------------------------------------------------------------

    def status(self) -> EndpointStatus:
        """As a worker reports, but for the adapters."""
        return EndpointStatus(
            model_info(self.speeds),
            queued=len(self.waiting),
            running=len(self.running),
            max_running=self.speeds.places,
            step_seconds=self._rates["step"].value,
            fetch_bytes_per_second=self._fetches.per_second,
            adapter_load_seconds=self.speeds.adapter_load_seconds if self.loads else 0.0,
            sequence_seconds=self._rates["sequence"].value,
            resident_prefixes=PrefixDigest(STRIDE_TOKENS, self._fingerprints()),
        )

    def _fingerprints(self) -> frozenset[int]:
        recent = chain.from_iterable(segment.fingerprints for segment in reversed(self.prefixes.values()))
        return frozenset(islice(recent, MAX_FINGERPRINTS))


def model_info(speeds: Speeds) -> ModelInfo:
    """The base model of every worker."""
    return ModelInfo("m", MODEL_DIGEST, b"s" * 32, "M", "bfloat16", 8192, 49152, 32, speeds.kv_bytes_per_token)
