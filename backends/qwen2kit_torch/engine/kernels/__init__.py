"""Triton kernels of one decoding step. They need triton; nothing imports them on the CPU."""
