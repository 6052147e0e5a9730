"""The one training loop: configuration, arguments, objectives, batches, checkpoints, telemetry."""
