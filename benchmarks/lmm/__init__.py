"""The paper's tasks on the paper's models: VQAv2, OK-VQA and COCO captions, for those who have the weights and data.

`python -m benchmarks.lmm run` trains and measures one row of a table, and goes on where it was stopped; `memory`
computes what a training needs, without weights; `report` writes the tables of what is there.  docs/lmm.md says how.

Read in this order: `samples` (the tasks' files), `prompts` (samples as a model's inputs), `methods`, `recipe` and
`training`, `answering`, `answers`, `captions` and `scoring` (what answers are worth), `runner`, `memory`, `report`.
"""
