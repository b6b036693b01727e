"""The ways KV bytes travel, one file each, all behind workers.transports.contract; they know nothing of sessions."""
