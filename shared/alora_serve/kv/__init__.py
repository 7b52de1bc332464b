"""The shared key-value store: keys, records and the backends that hold them."""
