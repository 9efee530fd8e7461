"""The data path, top to bottom: the one place where namespace, metadata, blocks and fetch meet."""
