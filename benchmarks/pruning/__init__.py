"""What pruned fine-tunes keep, by method, density, default and budget."""
