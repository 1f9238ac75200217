"""Training: the run loop and its steps, ZeRO, checkpoints, meters, one attempt's life."""
