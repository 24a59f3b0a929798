"""What two tasks' adapters do when they are composed into one.

`python -m benchmarks.composition --out out/composition` teaches the shipped base three tasks, each with an adapter of
its own, composes every two of them by `add_weighted_adapter`, and scores the result on both tasks: HiFICL beside LoRA,
whose "cat" adds up the two updates of the weights.  It writes results.json and composition.md.
"""
