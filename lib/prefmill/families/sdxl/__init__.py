"""The SDXL family: cached latents, denoising errors as scores, and export."""
