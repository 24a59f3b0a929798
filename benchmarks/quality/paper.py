"""Published figures that the tables show beside the measured ones, in the units of their sources."""

from __future__ import annotations

TASKS = ("VQAv2", "OK-VQA", "COCO (CIDEr)")
HIFICL, MIMIC = "arXiv:2603.12760", "arXiv:2504.08851"

# model, method, trainable parameters, the three tasks, source
MAIN = (
    ("LLaVA-Interleave-7B", "8-shot", "-", "68.19", "43.84", "1.2085", HIFICL),
    ("LLaVA-Interleave-7B", "LoRA", "19.7M (8.95x)", "70.12", "48.19", "1.0665", HIFICL),
    ("LLaVA-Interleave-7B", "MimIC", "17.0M (7.7x)", "74.40", "52.29", "1.3169", HIFICL),
    ("LLaVA-Interleave-7B", "HiFICL", "2.2M (1x)", "74.66", "54.19", "1.3315", HIFICL),
    ("Idefics2", "Task Vector", "-", "47.12", "38.27", "0.8761", "as reported by Hyper-ICL"),
    ("Idefics2", "LIVE", "0.13M", "67.60", "54.86", "1.2604", "not HiFICL's paper"),
    ("Idefics2", "MimIC", "0.26M", "69.29", "58.74", "1.2827", f"{HIFICL}; MimIC's own paper has CIDEr 1.3287"),
    ("Idefics2", "HiFICL", "2.2M", "72.08", "59.56", "1.2951", HIFICL),
    ("Idefics2", "Hyper-ICL (not measured here)", "1.18M", "71.17", "62.24", "1.3566", "Hyper-ICL, ICML 2026"),
)

# On Idefics2.
ABLATION = {
    "hificl": ("72.08", "59.56", "1.2951"),
    "hificl-teacher": ("70.09", "59.13", "1.2844"),
    "hificl-whole-k": ("70.58", "55.72", "1.2652"),
    "hificl-whole-v": ("69.31", "56.86", "1.2618"),
    "hificl-alpha-1": ("70.14", "58.51", "1.2808"),
}

# CHAIR_s and CHAIR_i in %.  Of 32 shots there is no row here: its figures stand in the text.
CHAIR = {
    "icl-8": ("-", "3.9", HIFICL),
    "mimic": ("8.51", "5.74", f"{MIMIC}, Idefics1"),
    "hificl": ("-", "2.2", HIFICL),
}
CHAIR_32_SHOT = ("16.78", "9.77")

TRAINING_TIME, TRAINING_FLOPS = 7.5, 14.3  # MimIC's over HiFICL's
