"""The daemon's HTTP API: one file per group of routes."""
