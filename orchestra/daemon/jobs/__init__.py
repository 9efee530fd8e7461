"""Work that outlives the request that asked for it: loads, with their state on disk. A daemon that starts again
goes on where the last one ended."""
