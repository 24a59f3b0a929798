"""What HiFICL costs: time, memory, FLOPs and parameters beside plain attention, LoRA, prefix tuning and prompting.

`python -m benchmarks.speed --out out/speed` measures seven parts, one JSON file each, and writes `speed.md` with a
picture per part.  Whatever is compared runs in one process, interleaved: every round runs each variant once, so that a
machine that slows down slows them all.  Times are medians with quartiles; a ratio is the median of the ratios within
each round.

    attention   the attention operation: plain SDPA, HiFICL, concatenated pairs, a second score matrix
    training    a training step of a whole model: frozen floor, LoRA, prefix tuning, HiFICL
    inference   prefill and decoding: base, LoRA, prefix tuning, HiFICL, eight demonstrations in the prompt
    lifecycle   save, load and switch adapters, and the first token after a switch: LoRA, HiFICL
    rows        eight tasks in one batch, each row with its adapter, and one after the other: base, LoRA, HiFICL
    serving     continuous batching, prompts with a common beginning and without: base, LoRA, HiFICL
    paper       the paper's efficiency figures: parameters on real configurations, training with a teacher and without

Parts may be run one at a time into the same folder: the report is made from every JSON file found there.

Read in this order: `presets`, `measure`, `variants`, `attention`, `training`, `inference`, `lifecycle`, `rows`,
`serving`, `teacher`, `checkpoints`, `paper`, `report`; `__main__` puts them together.
"""
