"""The reward model family: a backbone, one head a dimension, its scores."""
