"""Pretraining of a small backbone, from text files to a Hugging Face folder; the demo makes its own with it."""
