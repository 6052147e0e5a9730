"""Causal language models: loading, chat prompts and log-probability scores."""
