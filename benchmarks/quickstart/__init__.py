"""The main job of the package on real images, end to end, in a few minutes on a CPU.

`python -m benchmarks.quickstart --out out/quickstart` trains a small vision-language model on handwritten digits,
freezes it, teaches it two new tasks with a HiFICL adapter each (and with LoRA beside it), reports accuracies on
held-out images, and reloads the adapters in a fresh process that switches between them.

Read in this order: `data`, `base`, `training`, `adapters`, `serve`, `report`; `__main__` puts them together.
"""
