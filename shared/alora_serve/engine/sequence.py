"""One sequence in the batch: its tokens, where the adapter turns on, and whose memory its KV lies in.

::

    [0, loaded tokens)                  base KV, pinned in the prefix cache: the request's, or a neighbour's since
    [.., base_until)                    base KV computed here, adapter off, in slices reserved from the prefix cache
    [base_until, ...)                   adapter KV, in a private tail that nobody else can reach

``base_until`` is the invocation's start for an aLoRA, 0 for a plain LoRA, and beyond everything for the base model. An
answer of the base model is computed in a private tail as well, so that one call attends to the answers of many
sequences of a step, and copied to shared memory when a block of it is full, unless the same tokens are resident by
then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from alora_serve.engine.events import BaseComputed, SequenceStats, Sink
from alora_serve.engine.penalties import History
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.sequence_request import SequenceId, SequenceRequest
from alora_serve.kv.keys import BlockChain
from alora_serve.model.kv_memory import KVSegment, KVSlice, Prefix
from alora_serve.model.step import NARROW_TOKENS, Span
from alora_serve.model.tails import TailPool, TailSegment
from alora_serve.types import SamplingParams

BASE_GROWTH_TOKENS = 256
"""Room that a base turn reserves at a time for its answer."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Engine-owned state of one sequence. One thread."""

    id: SequenceId
    request: SequenceRequest
    sink: Sink
    cache: PrefixCache
    tails: TailPool
    submitted_at: float
    request_id: str = ""
    started_at: float = 0.0
    first_token_at: float = 0.0
    last_event_at: float = 0.0
    computed: int = field(init=False)
    generated: list[int] = field(init=False)
    history: History = field(init=False)
    _shared: tuple[KVSlice, ...] = field(init=False)
    _own: KVSlice | None = field(init=False, default=None)
    _room: KVSlice | None = field(init=False, default=None)
    _promised: list[KVSlice] = field(init=False, default_factory=list)
    _loaded: Prefix = field(init=False)
    _base: Prefix = field(init=False)
    _published: int = field(init=False)
    _held: list[Prefix] = field(init=False, default_factory=list)
    _written: dict[KVSegment, int] = field(init=False, default_factory=dict)
    _tail: TailSegment | None = field(init=False, default=None)
    _tail_used: int = field(init=False, default=0)
    _released: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.generated = list(self.request.generated)
        self.history = History(self.request.sampling or SamplingParams(), self.request.prompt, self.generated)
        self._start_after(self.request.prefix)

    def _start_after(self, prefix: Prefix) -> None:
        self._loaded = self._base = prefix
        self._shared = prefix.slices
        self.computed = self._published = prefix.tokens

    @property
    def loaded_tokens(self) -> int:
        """Positions whose KV was there: what this sequence did not compute."""
        return self._loaded.tokens

    @property
    def is_fresh(self) -> bool:
        """It has base KV to compute and has not begun."""
        return self.in_base_phase and self.computed == self._loaded.tokens

    @property
    def root(self) -> int:
        """The same for sequences whose KV begins with the same memory."""
        return id(self._shared[0].segment) if self._shared else id(self)

    @property
    def last_base_position(self) -> int:
        """Up to where base KV of others is of use: the last prompt token chooses the next and must run."""
        needed = len(self.request.prompt) - (self.request.sampling is not None)
        return min(self.base_until, needed, len(self.request.chain))

    @property
    def prompt_base_end(self) -> int:
        """End of the prompt's base KV, which this sequence is computing or has computed."""
        return min(self.base_until, len(self.request.prompt))

    @property
    def names_tail(self) -> bool:
        """Its base KV ends with the prompt's, and is published to the last token."""
        return self.request.sampling is None or self.request.adapter is not None

    def adopt(self, prefix: Prefix) -> None:
        """Go on after a longer prefix than the one loaded; before anything was computed here. Takes over its pin."""
        if not self.is_fresh:
            raise RuntimeError("a sequence that has computed KV of its own adopts no other")
        self.cache.release(self._loaded)
        self._start_after(prefix)

    @property
    def base_until(self) -> int:
        """Positions before it are base."""
        limit = self.request.base_until
        return 1 << 62 if limit is None else limit

    @property
    def known_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def in_base_phase(self) -> bool:
        """The next token to run is a base token."""
        return self.computed < self.base_until

    @property
    def pending_tokens(self) -> int:
        """Tokens that could run now without crossing the adapter's boundary."""
        return min(self.known_tokens, self.base_until if self.in_base_phase else self.known_tokens) - self.computed

    def append(self, token_id: int) -> None:
        """One more generated token."""
        self.generated.append(token_id)
        self.history.push(token_id)

    def token_at(self, position: int) -> int:
        """Token id at a position of prompt or answer."""
        prompt = self.request.prompt
        return prompt[position] if position < len(prompt) else self.generated[position - len(prompt)]

    @property
    def _in_tail(self) -> bool:
        """The next token's KV goes to the private tail: an adapter's, an answer's, or what is just before that."""
        answers = self.request.adapter is None and self.request.sampling is not None
        return not self.in_base_phase or (answers and self.computed + NARROW_TOKENS >= len(self.request.prompt))

    def span(self, count: int) -> Span:
        """Plan the next ``count`` tokens, as many as memory takes in one slice; call :meth:`commit` after they ran."""
        if self._in_tail:
            own, held = self._make_tail(), self._tail_used
            count = min(count, own.tokens - held)
            own.segment.used = held + count
        else:
            own = self._make_room(self.computed, self.pending_tokens + self._growth(self.known_tokens))
            count, held = min(count, own.end - self.computed), self._own.tokens if self._own else 0
        tokens = tuple(self.token_at(position) for position in range(self.computed, self.computed + count))
        return Span(tokens, self.computed, self._shared, KVSlice(own.segment, own.offset, held + count))

    def _make_room(self, position: int, wanted_tokens: int) -> KVSlice:
        """The room that has place for base KV at ``position``: the current one, or where that is full a new one."""
        room = self._room
        if room is not None and position < room.end:
            return room
        new = self.cache.reserve(self._base, wanted_tokens)
        self._promised.append(new)
        if room is not None and room.segment is new.segment and room.offset + room.tokens == new.offset:
            new = KVSlice(room.segment, room.offset, room.tokens + new.tokens)
        else:
            self._close_room()
        self._room = new
        return new

    def _make_tail(self) -> KVSlice:
        """All of the private tail, longer than what is used of it, by moving it where it has to be."""
        wanted = self._tail_used + self.pending_tokens
        if self._tail is None:
            self._tail = self.tails.take(wanted, self.computed)
            self._see_own()
        elif self._tail.capacity == self._tail_used:
            self._tail = self.tails.grow(self._tail, wanted)
        return KVSlice(self._tail, 0, self._tail.capacity)

    def _close_room(self) -> None:
        """What was written becomes history; the next token starts a slice of its own."""
        self._see_own()
        self._room = None

    def _see_own(self) -> None:
        if self._own is not None:
            self._shared = (*self._shared, self._own)
        self._own = None

    def commit(self, span: Span) -> None:
        """Account for a span that ran. At the end of the base phase its memory is closed to the adapter."""
        base = self.in_base_phase
        if self._in_tail:
            self._tail_used = span.own.tokens
        else:
            self._own = span.own
            self._grow_base(span.destination)
        self.computed += len(span.tokens)
        if base and not self.in_base_phase:
            self._close_room()

    def _grow_base(self, written: KVSlice) -> None:
        self._base = self._base.append(written)
        self._written[written.segment] = written.offset + written.tokens

    def _bring_home(self, chain: BlockChain, end: int) -> None:
        """Base KV before ``end`` that lies in the private tail, also where others reach it, once for all."""
        resident = self.cache.longer(chain, end, self._base.tokens) if self._base.tokens < end else None
        if resident is not None:
            self._held.append(resident)
            self._base = resident
            self._close_room()
        while (start := self._base.tokens) < end:
            tail = self._tail
            if tail is None:
                raise RuntimeError("base KV that is not in its place is in no tail either")
            room = self._make_room(start, max(end - start, self._growth(start)))
            count = min(end, room.end) - start
            home = KVSlice(room.segment, room.offset + start - room.start, count)
            home.positions().copy_(KVSlice(tail, start - tail.start, count).positions())
            self._grow_base(home)

    def _growth(self, position: int) -> int:
        """Tokens of a base answer that may come after ``position``, as many as are worth reserving at a time."""
        sampling = self.request.sampling
        if sampling is None or self.request.adapter is not None:
            return 0
        return min(len(self.request.prompt) + sampling.most_tokens - position, BASE_GROWTH_TOKENS)

    def publish(self, *, tail: bool) -> BaseComputed | None:
        """Make base KV computed here findable; a pinned view of it, or None when there is nothing new.

        Args:
            tail: name what follows the last full block, too. Done at the end of the base phase: each length has a name
                of its own.
        """
        chain, end = self.request.chain, min(self.computed, self.base_until)
        if not tail:
            end -= end % chain.block_tokens
        start = self._published
        if end <= start:
            return None
        self._published = end
        if end > len(chain):
            chain = chain.extended([self.token_at(position) for position in range(len(chain), end)])
        self._bring_home(chain, end)
        prefix = self._base.take(end)
        self.cache.publish(chain, prefix, start, end)
        self.cache.pin(prefix)
        return BaseComputed(chain, prefix, start, end)

    def tell_published(self, *, tail: bool) -> None:
        """:meth:`publish`, and hand it to the sink."""
        computed = self.publish(tail=tail)
        if computed is not None:
            self.sink(computed)

    def stats(self, now: float) -> SequenceStats:
        """What it cost, if it ends now."""
        first = self.first_token_at or now
        return SequenceStats(
            queue_seconds=self.started_at - self.submitted_at,
            prefill_seconds=first - self.started_at,
            first_token_seconds=first - self.submitted_at,
            decode_seconds=now - first,
            computed_tokens=len(self.request.prompt) - self.loaded_tokens,
            generated_tokens=len(self.generated),
        )

    def release(self) -> None:
        """Give back every pin and what was reserved but not written. Idempotent."""
        for promised in self._promised:
            written = self._written.get(promised.segment, 0) - promised.offset
            self.cache.settle(promised, min(max(written, 0), promised.tokens))
        self._promised.clear()
        for resident in self._held:
            self.cache.release(resident)
        self._held.clear()
        if self._tail is not None:
            self.tails.give_back(self._tail)
            self._tail = None
        if not self._released:
            self.cache.release(self._loaded)
            self._released = True
