"""Checkpoints of Hugging Face transformers, read and written: which config fields and tensors are which of ours."""
