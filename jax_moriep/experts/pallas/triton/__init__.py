"""The experts' kernels in Pallas-Triton: for every GPU of NVIDIA and AMD, every size and every option.

| file | |
|---|---|
| `passes.py`, `quantised.py` | the forward and the backward pass; of quantised experts |
| `products.py` | the products |
| `tuning.py`, `devices/` | how the products are cut on a device, and the numbers of each |
"""
