"""Stage 1 of the data path: path -> location. Knows nothing of metadata, blocks or fetching."""
