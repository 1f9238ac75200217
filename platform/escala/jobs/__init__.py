"""Jobs: state machine, store (queue and history), reconcile loop, and Ray's job server behind it."""
