"""HiFICL beside prompting, LoRA, IA3 and prefix tuning on a real language model, SmolLM2-135M-Instruct.

`python -m benchmarks.real_base prepare` downloads the model and the data of the tasks, once; `run` trains and measures
what is not yet in the results folder; `positions` moves the texts of trained adapters to later positions; `report`
writes the tables of what is there.

Read in this order: `sources` (what is downloaded), `base` (the model), `tasks`, `encoding` (samples as tensors, answers
measured), `methods`, `runner`, `positions`, `report`.
"""
