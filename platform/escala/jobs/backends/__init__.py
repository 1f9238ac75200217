"""What runs a job: Ray's job server."""
