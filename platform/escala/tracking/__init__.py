"""Runs: the tracker protocol, MLflow, the spool that outlives an unreachable server, and lineage."""
