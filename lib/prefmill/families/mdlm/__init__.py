"""Masked-diffusion language models: their scores, training and generation."""
