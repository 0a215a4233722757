"""The version of deltamerge, which locks, cards and hashes name."""

__version__ = "0.1.0"
