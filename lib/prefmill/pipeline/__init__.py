"""Plans, runs and explains pipelines."""
