"""prefmill: from judgements to preference-tuned models."""

__version__ = "0.1.0"
