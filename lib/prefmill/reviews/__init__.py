"""Reviews and papers: sources, canonical rows, splits, page images."""
