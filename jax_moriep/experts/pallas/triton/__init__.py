"""The experts' kernels in Pallas-Triton: for every GPU of NVIDIA and AMD, every size and every option."""
