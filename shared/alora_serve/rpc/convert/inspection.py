"""Requests that look at a prompt's tokens and generate none: ``Tokenize``."""

from __future__ import annotations

from alora_serve.rpc.convert.prompt import prompt_to_proto
from alora_serve.rpc.convert.tokens import pack_token_ids, unpack_token_ids
from alora_serve.types import PrefixHandle, Prompt, TokenizedPrompt
from alora_serve.v1 import alora_pb2


def tokenize_to_proto(prompt: Prompt) -> alora_pb2.TokenizeRequest:
    """The public request."""
    return alora_pb2.TokenizeRequest(prompt=prompt_to_proto(prompt))


def tokenized_to_proto(handle: PrefixHandle) -> alora_pb2.TokenizeResponse:
    """The public answer: what a handle says of its tokens."""
    return alora_pb2.TokenizeResponse(
        prefix_token_ids=pack_token_ids(handle.prefix_tokens),
        generation_prompt_token_ids=pack_token_ids(handle.generation_prompt_tokens),
    )


def tokenized_from_proto(response: alora_pb2.TokenizeResponse) -> TokenizedPrompt:
    """What a client is told.

    Raises:
        InvalidRequestError: tokens that are malformed.
    """
    return TokenizedPrompt(
        prefix_tokens=unpack_token_ids(response.prefix_token_ids, "prefix_token_ids"),
        generation_prompt_tokens=unpack_token_ids(response.generation_prompt_token_ids, "generation_prompt_token_ids"),
    )
