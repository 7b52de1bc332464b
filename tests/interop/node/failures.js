// Reads the details of a failed call: the google.rpc.Status that servers send in the trailer grpc-status-details-bin.
'use strict';

const protoLoader = require('@grpc/proto-loader');

const KEY = 'grpc-status-details-bin';
let types;

/** Loads google/rpc/*.proto from where they are. */
function loadDetails(googleProtoRoot) {
  types = protoLoader.loadSync(['google/rpc/status.proto', 'google/rpc/error_details.proto'], {
    keepCase: true,
    longs: Number,
    includeDirs: [googleProtoRoot],
  });
}

/** {code, message, details, trailers}: details by the name of their type, decoded; trailers: the request id there. */
function failureOf(error) {
  const details = {};
  const [packed] = error.metadata ? error.metadata.get(KEY) : [];
  if (packed) {
    const status = types['google.rpc.Status'].deserialize(packed);
    for (const { type_url, value } of status.details) {
      const name = type_url.split('/').pop();
      details[name] = types[name].deserialize(value);
    }
    details.status = { code: status.code, message: status.message };
  }
  const [trailers = null] = error.metadata ? error.metadata.get('x-request-id') : [];
  return { code: error.code, message: error.details, details, trailers };
}

module.exports = { loadDetails, failureOf };
