"""Trials of any training stage, by parallel workers."""
