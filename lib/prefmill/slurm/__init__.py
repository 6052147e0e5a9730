"""Submitting to Slurm, and repairing what fails there."""
