"""The node daemon: owns the cache directory, fills and evicts it, and answers misses."""
