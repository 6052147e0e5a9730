"""SFT selection, preference pairs, the dataset registry and its validation."""
