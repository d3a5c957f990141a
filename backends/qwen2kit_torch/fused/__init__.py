"""Elementwise work between matrix products, done in as few passes over memory as there can be.

Each operator is opaque to torch.compile, differentiable, and the same on every device: a Triton
kernel on CUDA, plain PyTorch elsewhere. Only `flash`, attention, needs a GPU.
"""
