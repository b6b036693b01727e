"""The bytes of KV blocks: the pool's host memory, the pieces that it is cut into, and their checksums."""
