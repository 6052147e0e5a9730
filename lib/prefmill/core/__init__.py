"""Configuration, errors, the stage contract, typed rows, and what needs nothing else of prefmill."""
