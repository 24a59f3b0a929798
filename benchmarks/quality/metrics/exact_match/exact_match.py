"""Exact match: the share of predictions that equal one of their references.

Strings are compared as they are, so upper case and blanks count.
"""

import datasets
import evaluate

TEXT = datasets.Value("string")


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="`predictions`: answers; `references`: for each, the answers of which any one counts.",
            features=datasets.Features({"predictions": TEXT, "references": datasets.Sequence(TEXT)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if not predictions:
            raise ValueError("exact_match got 0 predictions; pass at least one")
        for row, accepted in enumerate(references):
            if not accepted:
                raise ValueError(f"references[{row}] is empty; exact_match needs at least one right answer for each")
        right = [said in accepted for said, accepted in zip(predictions, references, strict=True)]
        return {"exact_match": sum(right) / len(right)}
