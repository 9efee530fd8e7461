"""Stage 4 of the data path: missing spans -> bytes, each asked for once, within a budget, in order of urgency."""
