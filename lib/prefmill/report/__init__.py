"""Pages: templates over numbers, charts, sentences."""
