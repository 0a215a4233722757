"""What merges take: time, memory, passes; beside other tools, at real sizes, on a GPU."""
