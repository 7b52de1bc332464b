"""The continuous batch: sequences on shared prefixes, each with its own adapter or none. Knows no gRPC."""
