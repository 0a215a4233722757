"""The version of deltamerge, that locks, cards and hashes name."""

__version__ = "0.1.0"
