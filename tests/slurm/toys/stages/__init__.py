"""Toy stages for tests of the pipeline on Slurm."""
