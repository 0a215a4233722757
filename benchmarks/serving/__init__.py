"""What deltas take, and what servers do with them."""
