"""What merges of many fine-tunes keep, by every method."""
