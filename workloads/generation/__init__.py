"""Generation: paged cache, engine, sampling, scheduling."""
