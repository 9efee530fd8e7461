"""Counting and saying what happens; below everything that is counted."""
