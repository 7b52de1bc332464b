"""The base-model service: prefills conversations with base weights and stores their KV."""
