"""Reward models: CLIP with a head for each dimension that people judge."""
