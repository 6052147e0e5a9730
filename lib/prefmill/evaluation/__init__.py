"""Metrics, comparisons and the report."""
