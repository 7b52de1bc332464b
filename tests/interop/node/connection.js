// A client of AloraService, made from the protos as any Node program would make it, that notes which RPCs it called.
'use strict';

const fs = require('fs');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');
const { failureOf } = require('./failures');

// Longs as text: seeds have 64 bits, and a JavaScript number has 53.
const LOADING = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };

class Connection {
  /** given: {address, proto_root, tls_ca_file?, api_key?}. called: RPC -> set of the status codes that it ended with. */
  constructor(given, called) {
    const definition = protoLoader.loadSync('alora_serve/v1/alora.proto', {
      ...LOADING,
      includeDirs: [given.proto_root],
    });
    const service = grpc.loadPackageDefinition(definition).alora_serve.v1.AloraService;
    const credentials = given.tls_ca_file
      ? grpc.credentials.createSsl(fs.readFileSync(given.tls_ca_file))
      : grpc.credentials.createInsecure();
    this.stub = new service(given.address, credentials);
    this.key = given.api_key;
    this.called = called;
  }

  close() {
    this.stub.close();
  }

  /** A unary call, to its end: {response} or {failure}, and the request id of its trailers. */
  unary(method, request, options = {}) {
    return new Promise((resolve) => {
      let result;
      const call = this.stub[method](request, this.metadata(options), calling(options), (error, response) => {
        this.note(method, error ? error.code : grpc.status.OK);
        result = error ? { failure: failureOf(error) } : { response };
      });
      call.on('status', (status) => resolve({ ...result, request_id: status.metadata.get('x-request-id')[0] }));
    });
  }

  /** A streaming call, to its end: every message, and the failure if there is one. onMessage may cancel the call. */
  stream(method, request, options = {}, onMessage = () => {}) {
    return new Promise((resolve) => {
      const messages = [];
      const call = this.stub[method](request, this.metadata(options), calling(options));
      const end = (code, failure) => {
        this.note(method, code);
        resolve({ messages, failure });
      };
      call.on('data', (message) => {
        messages.push(message);
        onMessage(message, call);
      });
      call.on('error', (error) => end(error.code, failureOf(error)));
      call.on('status', (status) => status.code === grpc.status.OK && end(status.code, null));
    });
  }

  metadata(options) {
    const metadata = new grpc.Metadata();
    if (this.key) metadata.set('authorization', `Bearer ${this.key}`);
    if (options.request_id) metadata.set('x-request-id', options.request_id);
    return metadata;
  }

  note(method, code) {
    (this.called[method] = this.called[method] || new Set()).add(code);
  }
}

function calling(options) {
  return { deadline: Date.now() + (options.timeout_seconds || 60) * 1000 };
}

module.exports = { Connection };
