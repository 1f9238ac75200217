"""What crosses a process: records, errors, attempts, checkpoints, and the files that hold them. Standard library."""
