"""The PyTorch backend: training and inference of one spec on CPU, CUDA or MPS."""
