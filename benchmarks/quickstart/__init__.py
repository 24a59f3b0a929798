"""The main job of the package on the shipped base model, end to end, in a few minutes on a CPU.

`python -m benchmarks.quickstart --out out/quickstart` teaches a frozen vision-language model two tasks with a HiFICL
adapter each, beside prompting and LoRA, scores all of them on test pictures, and reloads the adapters in a fresh
process that switches between them.

Read `adapters` first: it is all that a user of the package does. Then `asking`, `serve`, `report`; `__main__` puts them
together. `real` is a quickstart of its own, on a language model that has to be downloaded.
"""
