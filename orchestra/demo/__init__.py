"""What `orchestra demo` runs: an S3 server that counts, a data set, a node, a training, and the check of every byte.

Owns: putting those together in one temporary folder and taking them down again. Leaves to others: everything that is
demonstrated, which runs as processes of its own (the server, the daemon, the mount, the training script).
"""
