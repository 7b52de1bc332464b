// Calls every RPC of AloraService and prints what came as JSON. Reads what to call from standard input:
// {address, proto_root, google_proto_root, conversation, more, tokens, adapter, answering, plain, seed,
//  guarded: {address, tls_ca_file, keys: {user, small, admin}}}.
'use strict';

const fs = require('fs');
const { Connection } = require('./connection');
const { answerOf, pack, unpack } = require('./answers');
const { loadDetails } = require('./failures');

const LONG = { max_tokens: 1500, ignore_eos: true };

async function generate(connection, request, options) {
  const { messages, failure } = await connection.stream('Generate', request, options);
  return failure ? { failure } : answerOf(messages.map((message) => message.event));
}

/** Every kind of answer. */
async function answers(connection, given) {
  const prompt = { messages: given.conversation };
  const greedy = { max_tokens: 10, ignore_eos: true };
  const drawn = { ...greedy, max_tokens: 40, temperature: 1.0, top_p: 0.9, seed: given.seed, logprobs: true };
  const base = await generate(connection, { prompt, sampling: greedy });
  const prefilled = await connection.unary('Prefill', { prompt }, { request_id: 'node-prefill' });
  const byHandle = { handle: prefilled.response.handle };
  return {
    base,
    continued: await generate(connection, {
      prompt: { handle: base.handle, messages: given.more },
      sampling: greedy,
    }),
    prefilled: { usage: prefilled.response.usage, request_id: prefilled.request_id },
    appended: await generate(connection, { prompt: byHandle, adapter: given.adapter, sampling: greedy }),
    drawn: await generate(connection, { prompt: byHandle, adapter: given.answering, sampling: drawn }),
    plain: await generate(connection, { prompt, adapter: given.plain, sampling: greedy }),
    from_tokens: await generate(connection, {
      prompt: { token_ids: pack(given.tokens) },
      adapter: given.adapter,
      sampling: greedy,
    }),
    resumed: await resumed(connection, byHandle, given, drawn),
    fan_out: await fanOut(connection, prompt, given, greedy),
  };
}

/** A stream left after its first tokens, and gone on with as the API says. */
async function resumed(connection, prompt, given, sampling) {
  const request = { prompt, adapter: given.answering, sampling };
  const first = await connection.stream('Generate', request, {}, (message, call) => {
    if (message.event.chunk) call.cancel();
  });
  const left = answerOf(first.messages.map((message) => message.event));
  const rest = await generate(connection, {
    ...request,
    resume: {
      generated_token_ids: pack(left.tokens),
      invocation_start: left.invocation_start,
      adapter_digest: left.adapter_digest,
      seed: left.seed,
    },
  });
  return { left: left.tokens, rest: rest.tokens };
}

async function fanOut(connection, prompt, given, sampling) {
  const names = [given.adapter, '', given.plain, 'no-such-adapter'];
  const request = { prompt, targets: names.map((adapter) => ({ adapter })), sampling };
  const { messages, failure } = await connection.stream('FanOut', request);
  const targets = names.map((_, index) => messages.filter((message) => message.index === index));
  return {
    failure,
    targets: targets.map((own) => {
      const failed = own.find((message) => message.result === 'failure');
      return failed ? { failure: failed.failure } : answerOf(own.map((message) => message.event));
    }),
  };
}

/** Adapters and model. */
async function inspection(connection, given) {
  const listed = await connection.unary('ListAdapters', {});
  const loaded = await connection.unary('LoadAdapter', { name: given.adapter });
  const unloaded = await connection.unary('UnloadAdapter', { name: given.adapter });
  const model = await connection.unary('GetModel', {});
  const tokenized = await connection.unary('Tokenize', { prompt: { messages: given.conversation } });
  const judged = { prompt: { messages: given.conversation } };
  const one = await connection.unary('RunIntrinsic', { ...judged, intrinsic: given.answering });
  const some = await connection.stream('RunIntrinsics', { ...judged, intrinsics: [given.adapter, given.answering] });
  const wanted = { prompt: { messages: given.conversation }, adapter: given.adapter, continuations: ['yes', 'no'] };
  const scored = await connection.unary('Score', wanted);
  return {
    listed: listed.response.adapters.map(({ name, digest, kind, rank, invocation_token_ids }) => ({
      name,
      digest,
      kind,
      rank,
      invocation_tokens: unpack(invocation_token_ids),
    })),
    loaded: loaded.response.adapter,
    unloaded: unloaded.response,
    scored: scored.response.scores.map(({ token_ids, logprobs }) => ({ tokens: unpack(token_ids), logprobs })),
    judged: one.response,
    judged_together: some.messages.sort((left, right) => left.index - right.index),
    tokens: unpack(tokenized.response.prefix_token_ids),
    model: { ...model.response.model, model_digest: model.response.model.model_digest.toString('hex') },
  };
}

/** Calls that must fail, and how they do. */
async function failures(connection, given) {
  const prompt = { messages: given.conversation };
  const bad = { prompt, sampling: { top_p: 0, temperature: -1 } };
  return {
    bad_fields: (await generate(connection, bad, { request_id: 'node-bad' })).failure,
    bad_prompt: (await connection.unary('Prefill', {})).failure,
    unknown: (await generate(connection, { prompt, adapter: 'no-such-adapter' })).failure,
    late: (await generate(connection, { prompt, sampling: LONG }, { timeout_seconds: 0.3 })).failure,
    cancelled: await cancelled(connection, prompt),
    not_served: {
      PurgeTenant: (await connection.unary('PurgeTenant', {})).failure,
    },
  };
}

async function cancelled(connection, prompt) {
  const { messages, failure } = await connection.stream('Generate', { prompt, sampling: LONG }, {}, (message, call) => {
    if (message.event.chunk) call.cancel();
  });
  return { failure, tokens: answerOf(messages.map((message) => message.event)).tokens.length };
}

/** A router that asks for TLS and a key. */
async function guarded(given, called) {
  const { keys, ...place } = given.guarded;
  const open = (key) => new Connection({ ...given, ...place, api_key: key }, called);
  const [nobody, user, small, admin] = [undefined, keys.user, keys.small, keys.admin].map(open);
  const prompt = { messages: given.conversation };
  const adapter = { name: given.adapter };
  let refused;
  await small.stream('Generate', { prompt, sampling: LONG }, {}, async (message, call) => {
    if (refused === undefined && message.event.chunk) {
      refused = generate(small, { prompt, sampling: LONG });
      await refused;
      call.cancel();
    }
  });
  const result = {
    without_key: (await nobody.unary('ListAdapters', {})).failure,
    with_key: await generate(user, { prompt, adapter: given.adapter, sampling: { max_tokens: 10, ignore_eos: true } }),
    without_role: (await user.unary('LoadAdapter', adapter)).failure,
    with_role: (await admin.unary('LoadAdapter', adapter)).response.adapter.name,
    over_quota: (await refused).failure,
  };
  for (const connection of [nobody, user, small, admin]) connection.close();
  return result;
}

async function main() {
  const given = JSON.parse(fs.readFileSync(0, 'utf8'));
  loadDetails(given.google_proto_root);
  const called = {};
  const connection = new Connection(given, called);
  const result = {
    answers: await answers(connection, given),
    inspection: await inspection(connection, given),
    failures: await failures(connection, given),
    guarded: await guarded(given, called),
  };
  connection.close();
  result.called = Object.fromEntries(Object.entries(called).map(([method, codes]) => [method, [...codes]]));
  process.stdout.write(JSON.stringify(result));
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
