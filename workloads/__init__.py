"""The data plane: what runs on the cluster, with tensors. Nothing in escala imports it."""
