"""Which nodes there are and which of them own what; see docs/cluster.md. Each module says what it owns."""
