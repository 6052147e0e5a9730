"""The checklist's own optimisation: candidates, their reliability, their choice, weights and held-out value."""
