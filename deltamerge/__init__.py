"""Merge fine-tuned models and prune their deltas, driven by a YAML recipe."""

__version__ = "0.1.0"
