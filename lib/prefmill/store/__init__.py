"""What is on disk: artifacts, JSON Lines, journals, cached tensors, work that can be resumed."""
