"""The paper's efficiency figures, recomputed: parameters on the real configurations, and what a teacher costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers as tf
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.progress import track
from torch import Tensor

from peft_hificl import HiFICLLayer

from ..common.colors import GREY
from ..common.tables import Record, Table, count, decimal, duration, scientific, tabulate
from .checkpoints import IMAGE_AND_TEXT, MODELS, without_weights
from .measure import flops, interleave, ratio, summary
from .presets import CONFIGS, HIFICL, LORA, PROJECTIONS, SHOTS, Preset, adapt, build
from .report import COLORS, Bar, spread
from .teacher import make_prompts, step_alone, step_with_teacher

_PROMPTS = SHOTS + 1  # a teacher's prompt in lengths of the query

TITLE = "The paper's efficiency figures"
METHOD = f"""Parameters: models built from their configurations on the meta device, adapted by `get_peft_model` and
counted. HiFICL n = 8, r = 8; LoRA r = 16 on q, k, v and o of the text decoder, or on every module of these names,
which takes in the vision tower. MimIC's own formula is per head a vector of d, a linear form of d and its bias.

Where the figures come from. 19.7M is LoRA on every module of these names in LLaVA-Interleave-Qwen-7B, whose SigLIP
tower has 26 layers (q, k, v there; its output projection has another name). 17.0M for MimIC on LLaVA is another class
than MimIC's: a d x d projection per head with its bias in the place of the vector. That projection's einsum, `ndd`,
reads the diagonal alone: of 16.8M weights counted, 131,072 have an effect.

Teacher: a step is forward and backward. Without a teacher it is cross-entropy on the query. With one, the base model
first reads {SHOTS} demonstrations and the query, all of one length, without gradients, and every layer's hidden states
are aligned. A teacher's forward costs 2 N T for its prompt of T tokens and N weights, the student's forward and
backward through frozen weights 4 N t for its query: {SHOTS} demonstrations of the query's length make 1 + {_PROMPTS} /
2 = {1 + _PROMPTS / 2:.1f}. The 14.3 of the paper would take a teacher's prompt of some 27 times the query; its lengths
are not published. FLOPs: text decoder on the meta device, and with the vision tower of LLaVA-Interleave, which sees 1
image a step, or 1 + {_PROMPTS}. Time: a small model of random weights, the lengths in the table."""

_PAPER_FLOPS, _PAPER_TIME = 14.3, 7.5


def parameters(name: str) -> Record:
    """Trainable parameters of each method on one of `MODELS`."""

    def attached(config: PeftConfig) -> PeftModel:
        model = without_weights(MODELS[name]())
        with torch.device("meta"):
            return get_peft_model(model, config)

    hificl = attached(CONFIGS[HIFICL]())
    in_decoder = rf"({hificl.peft_config['default'].target_modules})\.({'|'.join(PROJECTIONS)})"
    shapes = [module.head_shape for module in hificl.modules() if isinstance(module, HiFICLLayer)]
    return {
        "kind": "parameters",
        "model": name,
        "layers": len(shapes),
        "heads": shapes[0][0],
        "head_dim": shapes[0][1],
        "hificl": hificl.get_nb_trainable_parameters()[0],
        "lora_decoder": attached(LoraConfig(r=16, target_modules=in_decoder)).get_nb_trainable_parameters()[0],
        "lora_everywhere": attached(CONFIGS[LORA]()).get_nb_trainable_parameters()[0],
        "mimic": sum(heads * (e + d + 1) for heads, d, e, _ in shapes),
        "mimic_projection": sum(heads * (e * e + e + d + 1) for heads, d, e, _ in shapes),
        "mimic_projection_counted": sum(heads * e * e for heads, d, e, _ in shapes),
        "mimic_projection_read": sum(heads * e for heads, d, e, _ in shapes),
    }


def teacher_flops(name: str) -> Record:
    """FLOPs of a step without and with a teacher, on the text decoder of one of `MODELS`."""
    config = MODELS[name]()
    decoder = without_weights(config.text_config)
    with torch.device("meta"):
        student = adapt(decoder, HIFICL)
    tokens = sum(IMAGE_AND_TEXT[name])
    query, prompt = make_prompts(config.text_config.vocab_size, tokens, torch.device("meta"))
    alone = flops(lambda: step_alone(student, query))
    taught = flops(lambda: step_with_teacher(student, decoder, query, prompt))
    record: Record = {
        "kind": "flops",
        "model": name,
        "query_tokens": tokens,
        "prompt_tokens": prompt.shape[1],
        "alone": alone,
        "taught": taught,
        "ratio": taught / alone,
    }
    if isinstance(config, tf.LlavaConfig):
        image = flops(partial(_see, without_weights(config), torch.empty(1, 3, 384, 384, device="meta")))
        record["ratio_with_images"] = (taught + (SHOTS + 2) * image) / (alone + image)
    return record


@torch.no_grad()
def _see(model: tf.PreTrainedModel, pixels: Tensor) -> None:
    model.get_image_features(pixel_values=pixels.to(model.dtype))


def teacher_time(preset: Preset, device: torch.device) -> Record:
    """Seconds of a step without and with a teacher, on a small model."""
    teacher = build(preset.model, device)
    student = adapt(teacher, HIFICL)
    query, prompt = make_prompts(preset.model.vocabulary, preset.image_tokens + preset.text_tokens, device)
    steps = {
        "alone": partial(step_alone, student, query),
        "taught": partial(step_with_teacher, student, teacher, query, prompt),
    }
    samples = interleave(steps, device, preset.seconds)
    return {
        "kind": "time",
        "query_tokens": query.shape[1],
        "prompt_tokens": prompt.shape[1],
        "alone": summary(samples, "alone"),
        "taught": summary(samples, "taught"),
        "ratio": ratio(samples, "taught", "alone"),
        "flops_ratio": flops(steps["taught"]) / flops(steps["alone"]),
    }


def run(preset: Preset, device: torch.device, compiled: bool) -> list[Record]:
    tasks: list[Callable[[], Record]] = [partial(parameters, name) for name in MODELS]
    tasks += [partial(teacher_flops, name) for name in IMAGE_AND_TEXT]
    tasks.append(partial(teacher_time, preset, device))
    return [task() for task in track(tasks, TITLE)]


def tables(records: list[Record]) -> list[Table]:
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("parameters", "flops", "time")}
    model = {r["model"]: r for r in of["parameters"]}
    llava, idefics2 = model["LLaVA-Interleave-Qwen-7B"], model["Idefics2-8B"]
    teacher = {r["model"]: r for r in of["flops"]}
    seen, measured = teacher["LLaVA-Interleave-Qwen-7B"], of["time"][0]
    beside = [
        ("HiFICL, parameters on LLaVA", "2.2M", count(llava["hificl"])),
        ("LoRA, parameters on LLaVA", "19.7M", count(llava["lora_everywhere"])),
        ("MimIC, parameters on Idefics2", "0.26M", count(idefics2["mimic"])),
        (
            "MimIC, parameters on LLaVA",
            "17.0M",
            f"{count(llava['mimic_projection'])}, of which {count(llava['mimic_projection_counted'])} are a projection "
            f"that reads {count(llava['mimic_projection_read'])} of them; MimIC's own formula: {count(llava['mimic'])}",
        ),
        (
            f"FLOPs, {SHOTS}-shot teacher over none",
            f"{_PAPER_FLOPS}x",
            f"{seen['ratio']:.1f}x; {seen['ratio_with_images']:.1f}x with the vision tower",
        ),
        (f"time, {SHOTS}-shot teacher over none", f"{_PAPER_TIME}x", f"{measured['ratio']:.1f}x (a small model)"),
    ]
    return [
        Table("Beside the paper", ("what", "paper", "here"), beside),
        tabulate(
            "Trainable parameters",
            of["parameters"],
            {
                "model": "model",
                "layers x heads x d": lambda r: f"{r['layers']} x {r['heads']} x {r['head_dim']}",
                "HiFICL": lambda r: count(r["hificl"]),
                "LoRA, decoder": lambda r: count(r["lora_decoder"]),
                "LoRA, everywhere": lambda r: count(r["lora_everywhere"]),
                "MimIC": lambda r: count(r["mimic"]),
            },
        ),
        tabulate(
            f"FLOPs of a training step without and with an {SHOTS}-shot teacher",
            of["flops"],
            {
                "model": "model",
                "query tokens": "query_tokens",
                "teacher's tokens": "prompt_tokens",
                "without": lambda r: scientific(r["alone"]),
                "with": lambda r: scientific(r["taught"]),
                "ratio": lambda r: decimal(r["ratio"]),
                "with the vision tower": lambda r: decimal(r["ratio_with_images"]) if "ratio_with_images" in r else "-",
            },
        ),
        tabulate(
            f"Time of a training step without and with an {SHOTS}-shot teacher, small model",
            of["time"],
            {
                "query tokens": "query_tokens",
                "teacher's tokens": "prompt_tokens",
                "without": lambda r: f"{duration(r['alone']['seconds'])} ({spread(r['alone'])})",
                "with": lambda r: f"{duration(r['taught']['seconds'])} ({spread(r['taught'])})",
                "ratio": lambda r: decimal(r["ratio"]),
                "ratio of FLOPs": lambda r: decimal(r["flops_ratio"]),
            },
        ),
    ]


def bars(records: list[Record]) -> list[Bar]:
    return []  # these figures stand beside the paper's; none has to be reached


def draw(records: list[Record], figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    rows = [r for r in records if r["kind"] == "parameters"]
    methods = (
        ("hificl", HIFICL, COLORS[HIFICL]),
        ("lora_decoder", LORA, COLORS[LORA]),
        ("mimic", "MimIC", GREY),
    )
    for place, (key, label, color) in enumerate(methods):
        drawn = left.bar(
            [i + 0.27 * (place - 1) for i in range(len(rows))],
            [r[key] / 1e6 for r in rows],
            0.25,
            label=label,
            color=color,
        )
        left.bar_label(drawn, fmt="%.2f", fontsize=8)
    left.set_xticks(range(len(rows)), [str(r["model"]).replace("-Qwen", "\n-Qwen") for r in rows], fontsize=8)
    left.set_yscale("log")
    left.set_ylabel("trainable parameters, millions")
    left.legend(frameon=False)
    taught = [r for r in records if r["kind"] in ("flops", "time")]
    ratios = {f"FLOPs, {r['model']}" if r["kind"] == "flops" else "time, small model": r["ratio"] for r in taught}
    ratios |= {"FLOPs, paper": _PAPER_FLOPS, "time, paper": _PAPER_TIME}
    right.bar_label(right.barh(list(ratios), list(ratios.values()), color=GREY), fmt="%.1f")
    right.set_title(f"step with an {SHOTS}-shot teacher over one without", fontsize=10)
    right.tick_params(axis="y", labelsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
