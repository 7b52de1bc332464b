"""Makes a process that finds this on its path one of a later release, whose records have another version."""

from alora_serve.kv import record

record.RECORD_VERSION += 1
