"""Model families: each loads, batches, scores and generates."""
