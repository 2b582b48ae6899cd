"""What is there? The model, captured and folded into segments; the cluster, from a name, a file or this machine."""
