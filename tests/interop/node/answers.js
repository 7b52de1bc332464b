// Puts the events of a generation together.
'use strict';

/** Packed little-endian uint32 as numbers. */
function unpack(bytes) {
  return Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readUInt32LE(4 * index));
}

/** Numbers as packed little-endian uint32. */
function pack(tokens) {
  const bytes = Buffer.alloc(4 * tokens.length);
  tokens.forEach((token, index) => bytes.writeUInt32LE(token, 4 * index));
  return bytes;
}

/** What a finished stream of GenerationEvents says. */
function answerOf(events) {
  const answer = { kinds: [], tokens: [], text: '', logprobs: [], handle: null };
  for (const event of events) {
    answer.kinds.push(event.event);
    if (event.started) {
      answer.seed = event.started.seed;
      answer.adapter_digest = event.started.adapter_digest;
      // An optional field that is not set is not there, whatever the defaults.
      answer.invocation_start = event.started.invocation_start ?? null;
    } else if (event.chunk) {
      answer.tokens.push(...unpack(event.chunk.token_ids));
      answer.text += event.chunk.text;
      answer.logprobs.push(...event.chunk.logprobs);
    } else if (event.finished) {
      answer.text += event.finished.text;
      answer.finish_reason = event.finished.finish_reason;
      answer.usage = event.finished.usage;
      answer.handle = event.finished.handle;
    }
  }
  return answer;
}

module.exports = { answerOf, pack, unpack };
