"""The `prefmill` command and `python -m stages.STAGE`."""
