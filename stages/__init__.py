"""One file a stage: what it reads, what it writes, its configuration and its `run`."""
