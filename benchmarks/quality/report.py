"""What the runs show: Markdown tables laid out like the paper's, the goals, and three pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.tables import NOT_MEASURED, Table
from . import goals, paper, plots, tables
from .frame import METHODS, SEEDS, TASKS, Results, load
from .plan import START_SEEDS, TRIAL_SEEDS

__all__ = ["METHODS", "TASKS", "write"]

Block = str | Table

SCORES = f"""\
Mean ± half the width of the 95 % t-interval over {SEEDS} seeds; the number of seeds is given where there are fewer, `-`
where nothing was measured. A mean over tasks is given only where every task was measured, and is over the seeds that
have them all. Captions score by their CIDEr over that of a right caption. What draws on no training samples stands for
every number of them. HiFICL and its ablations begin as demonstrations, but where the row names another start, and their
keys learn at 0.3 of the rate, but where it says one rate. In bold: the best of a column."""


def write(results: Path) -> Path:
    """Write `report.md` and its pictures into the folder of results, from whatever of them is there."""
    found = load(results)
    pictures = plots.save(found, results)
    sections = _sections(found, {name: f"![{title}]({name})" for name, title in pictures.items()})
    lines = ["# HiFICL beside prompting, its approximations and other adapters", ""]
    lines += ["Written by `python -m benchmarks.quality report` from the JSON files beside it.", ""]
    lines += [f"- [{title}](#{anchor})" for anchor, title, _ in sections]
    for anchor, title, blocks in sections:
        lines += ["", f'<a id="{anchor}"></a>', "", f"## {title}"]
        for block in blocks:
            lines += ["", *(block.markdown() if isinstance(block, Table) else [block])]
    path = results / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _sections(found: Results, pictures: dict[str, str]) -> list[tuple[str, str, Sequence[Block]]]:
    at_edge, chosen = tables.edges(found)
    return [
        (
            "goals",
            "Goals",
            [
                "Decided by code from the tables below. Above: the mean difference of pairs with the same task, "
                "samples and seed is positive; clearly: its 95 % interval is, too. HiFICL with n = 16 became a row of "
                "its own after test results of it had been seen, and with two sizes HiFICL has two chances.",
                goals.table(goals.evaluate(found)),
            ],
        ),
        (
            "main",
            "Main results",
            [SCORES, tables.main(found), tables.published(), pictures["parameters.png"], pictures["shots.png"]],
        ),
        (
            "samples",
            "Number of training samples",
            [pictures["samples.png"], tables.by_samples(found), *(tables.by_samples(found, task) for task in TASKS)],
        ),
        (
            "paired",
            "Paired tests",
            [
                "Differences of pairs with the same task, samples and seed, over all tasks those of each seed's mean; "
                "p of the two-sided paired t-test over seeds. Holm's correction is across tasks, within one "
                "comparison and number of samples.",
                tables.comparisons(found),
                tables.comparisons(found, "hificl-n16", tables.OTHERS_OF_16),
                *(tables.comparison(found, other) for other in tables.OTHERS),
                *(tables.comparison(found, other, "hificl-n16") for other in tables.OTHERS_OF_16),
            ],
        ),
        (
            "ablation",
            "Ablation, rank and number of pairs",
            [
                "The paper's figures are those of Idefics2.",
                tables.ablation(found),
                "The paper finds r = 8 the best for VQAv2 and r = 16 for OK-VQA. Rates are those of n = 8, r = 8, but "
                "for n = 16, which has its own.",
                tables.ranks(found),
                tables.pairs(found),
            ],
        ),
        (
            "hallucination",
            "Hallucination",
            [
                "CHAIR_s: captions that name an object that is not in the picture; CHAIR_i: named objects that are "
                f"not; recall: objects of the picture that are named. MimIC's own paper has {paper.CHAIR_32_SHOT[0]} "
                f"and {paper.CHAIR_32_SHOT[1]} for 32-shot prompting of Idefics1.",
                tables.hallucination(found),
            ],
        ),
        ("costs", "Costs", _costs(found)),
        (
            "rates",
            "Learning rates",
            [
                f"{at_edge} of {chosen} chosen rates lie at the edge of their grid (edge); `better` names a rate "
                "with a higher validation score than the chosen one. Rates without a grid were set, not chosen.",
                tables.rates(found),
            ],
        ),
        (
            "trials",
            "Settings that were tried on validation data",
            [
                f"Mean of {len(TRIAL_SEEDS)} seeds, none of them one of those that are tested, at the rate that is "
                "best for the setting and task. Settings are HiFICL's own but for what a row names.",
                *tables.trials(found),
                f"Where HiFICL starts, beside a LoRA of its size; {len(START_SEEDS)} seeds, keys at 0.3 of the rate.",
                tables.starts(found),
            ],
        ),
        ("runs", "Runs", _runs(found)),
    ]


def _costs(found: Results) -> list[Block]:
    if not found.cost_rows:
        return [f"{NOT_MEASURED.capitalize()}; the training time of the runs is.", tables.teachers(found)]
    measured_on = "; ".join(
        ", ".join(f"{key} {value}" for key, value in found.costs[part].items())
        for part in ("hardware", "versions")
        if found.costs.get(part)
    )
    return [f"Measured on {measured_on or 'an unnamed machine'}.", tables.costs(found), tables.teachers(found)]


def _runs(found: Results) -> list[Block]:
    blocks: list[Block] = [tables.coverage(found)]
    if unknown := tables.unknown(found):
        blocks.append(f"Not in this report: {', '.join(unknown)}.")
    if found.unusable:
        blocks += ["Files that could not be used:", "\n".join(f"- `{line}`" for line in found.unusable)]
    return blocks
