"""The embedded key-value store on LMDB."""

from alora_serve.kv.lmdb.files import default_location, disk_location
from alora_serve.kv.lmdb.store import LmdbStore

__all__ = ["LmdbStore", "default_location", "disk_location"]
