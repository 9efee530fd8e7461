"""What the nodes of a cluster ask one another besides bytes: how they are, what they hold, listings, mounts, loads.
The answers are in api/asked.py, on the port that api/between.py opens."""
