"""The ways KV bytes travel, one file each, all behind workers.kv_transfer.transport; they know nothing of sessions."""
