"""The HTTP front door: OpenAI's API, translated to the gRPC API of a router."""
