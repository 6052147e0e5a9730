"""Preference objectives, the trainer and its telemetry."""
