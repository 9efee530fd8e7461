"""Stage 2 of the data path: location -> what is there now (size, time, version), no older than freshness allows.

Covers: records on disk that every process of the node maps, and the daemon's catalog that refreshes them.
Does not cover: the namespace above stores, the bytes.
"""
