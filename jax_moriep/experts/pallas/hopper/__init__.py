"""The experts' kernels in Pallas-Mosaic, for NVIDIA's Hopper GPUs: the common sizes, faster than Triton's."""
