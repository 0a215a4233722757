"""The experiments of the DAREx paper (arXiv 2410.09344), scaled down: `python -m benchmarks.paper --list`."""

# Every module with experiments: each has `EXPERIMENTS`, a tuple of `frame.Experiment`.
MODULES: tuple[str, ...] = (
    "tables", "figures", "merging", "storage", "decoder", "lora", "vision", "theory",
)  # fmt: skip
