"""The maths of HiFICL on tensors: torch alone, no PEFT and no transformers.

`formula` is the definition, `kernels` the attention kernels of PyTorch that return their log-sum-exp, and `merged` the
formula at the cost of those kernels.
"""
