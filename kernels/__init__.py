"""What runs fastest on the chip? Triton kernels, each with a plain-PyTorch reference of the same numbers."""
