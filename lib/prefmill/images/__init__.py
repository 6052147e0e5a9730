"""The image pipeline: prompts, generated images, ratings, pairs."""
