"""Parity of HiFICL with in-context learning, its approximations, LoRA and prefix tuning, on the shipped base model.

`python -m benchmarks.quality run` trains and tests what is not yet in the results folder, `costs` measures steps and
answers side by side, `trials` compares settings of HiFICL on validation data; `report` writes tables and plots of what
is there.

Read in this order: `tasks`, `metrics`, `encoding` (prompts as tensors), `methods`, `training`, `plan` (which runs there
are, and how alike they must be), `store`, `runner`, `report`.
"""
