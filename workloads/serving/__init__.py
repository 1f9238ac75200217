"""Rollouts on Ray Serve: deployments, OpenAI's HTTP interface, weight versions."""
