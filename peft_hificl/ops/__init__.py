"""The maths of HiFICL on tensors: torch alone, no PEFT and no transformers.

`formula` is the definition, with the score matrix in memory.  `kernels` are PyTorch's attention kernels that return
their log-sum-exp.  `merged` computes the formula with these kernels, without a score matrix.
"""
