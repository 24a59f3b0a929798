"""Memory, traffic and FLOPs of one adapter and of many, at 7B, 70B and 405B, computed without weights.

`python -m benchmarks.scale` builds the base models on the meta device, attaches HiFICL and LoRA by PEFT, counts, and
writes tables. Nothing here is measured.
"""
