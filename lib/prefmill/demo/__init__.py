"""Tiny models, toy languages and pictures for demos and tests."""
