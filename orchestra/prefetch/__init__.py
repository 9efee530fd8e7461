"""Fetching before it is asked for. Listens to what is read and calls the engine at lower priority: remove it and reads
still work, only later."""
