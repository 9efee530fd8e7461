"""Stage 3 of the data path: object and range -> bytes on this node's disk, or the blocks that are missing.

Covers: geometry, names and formats in the cache directory, reading (any process), writing and evicting (the daemon).
Does not cover: where missing bytes come from (fetch), which version is current (metadata).
"""
