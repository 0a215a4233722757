"""Benchmarks, in folders by question: README.md says which command answers which."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
