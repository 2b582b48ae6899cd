"""Who runs it? The Program of one rank on torch.distributed."""
