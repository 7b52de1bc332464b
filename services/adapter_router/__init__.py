"""The adapter router: the public API, in front of base prefill and the decode workers. Needs no torch."""
