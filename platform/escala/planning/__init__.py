"""Plans: what a law, its limits and a cluster's speed say about the next run."""
