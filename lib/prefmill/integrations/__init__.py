"""Other trainers and their files: TRL, LLaMA-Factory."""
