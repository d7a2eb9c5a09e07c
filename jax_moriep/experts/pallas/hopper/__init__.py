"""The experts' kernels in Pallas-Mosaic, for NVIDIA's Hopper GPUs: the common sizes, faster than Triton's.

| file | |
|---|---|
| `support.py` | what they can run, and the rows of a tile |
| `passes.py`, `quantised.py` | the forward and the backward pass; of quantised experts |
| `act_grad.py` | the way back through the second product and the activation |
| `products.py`, `fp8.py`, `few.py` | the products: 16-bit and f32, float8, and float8 with few rows |
| `weight_gradient.py`, `tf32.py` | weight gradients: 16-bit; f32 |
| `scaled.py` | sums of float8 products |
| `stream.py` | how operands come to the matrix units |
| `launch.py` | the call of Pallas, and the walk over tiles |
"""
