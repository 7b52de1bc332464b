"""Which log-probabilities are told, and where there are none."""

from __future__ import annotations

import math

import pytest
import torch

from alora_serve.engine.events import SequenceEvent, TokensScored
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.scoring import ScoringRequest, tell_scores
from alora_serve.engine.sequence import Sequence
from alora_serve.engine.sequence_request import SequenceId
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import Prefix
from alora_serve.model.tails import TailPool
from in_process import CountingMetrics

LAYOUT = KVLayout(1, 1, 1, "float32")
CPU = torch.device("cpu")
GIVEN = (1, 0)


def _scored(events: list[SequenceEvent]) -> Sequence:
    """Of a prompt of one token, after which ``GIVEN`` are scored."""
    cache = PrefixCache(LAYOUT, budget_bytes=1 << 20, device=CPU, metrics=CountingMetrics())
    prompt = (2, *GIVEN[:-1])
    chain = BlockChain(BlockHash(b"r" * 32), prompt, 4)
    request = ScoringRequest(prompt=prompt, prefix=Prefix(), chain=chain, base_until=0, given=GIVEN)
    return Sequence(SequenceId(0), request, events.append, cache, TailPool(LAYOUT, CPU), submitted_at=0.0)


@pytest.mark.parametrize("spoilt", [math.inf, math.nan])
def test_scores_are_told_but_of_a_row_in_which_no_token_has_a_probability(spoilt: float) -> None:
    told: list[list[SequenceEvent]] = [[], [], []]
    batch = [(sequence, sequence.span(2)) for sequence in map(_scored, told)]
    logits = torch.zeros(6, 4)
    logits[0, 3] = -math.inf  # of another token than the given one
    logits[1, GIVEN[1]] = -math.inf
    logits[3, 3] = spoilt
    logits[4] = -math.inf
    others, untold = tell_scores(batch, [2, 2, 2], logits)
    assert others is None
    assert untold == [batch[1][0], batch[2][0]]
    assert told == [[TokensScored((pytest.approx(-math.log(3)), -math.inf))], [], []]
