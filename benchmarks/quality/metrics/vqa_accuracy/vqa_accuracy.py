"""VQA accuracy (Antol et al. 2015, VQA: Visual Question Answering), as the VQA v2 evaluation computes it.

Several people, usually ten, answered each question. With m(S) the number of answers in S that equal the prediction,

    accuracy = mean over the annotators a of min(m(all answers but a's) / 3, 1),

and the metric is the mean over the questions. Leaving one annotator out makes the figure comparable to people's own
accuracy, where each is judged by the others.

The official script first removes articles and punctuation and spells numbers one way. That is left to the caller:
strings are compared as they are.
"""

import datasets
import evaluate

TEXT = datasets.Value("string")


def accuracy(said: str, answers: list[str]) -> float:
    """Accuracy of one prediction; only two cases exist, as the annotator left out agrees with it or does not."""
    agree = answers.count(said)
    differ = len(answers) - agree
    return (agree * min((agree - 1) / 3, 1) + differ * min(agree / 3, 1)) / len(answers)


class VqaAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Antol et al., VQA: Visual Question Answering, ICCV 2015",
            inputs_description="`predictions`: answers; `references`: for each, the answers of all annotators.",
            features=datasets.Features({"predictions": TEXT, "references": datasets.Sequence(TEXT)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if not predictions:
            raise ValueError("vqa_accuracy got 0 predictions; pass at least one")
        for row, answers in enumerate(references):
            if len(answers) < 2:
                raise ValueError(
                    f"references[{row}] has {len(answers)} human answers; vqa_accuracy leaves one annotator out and "
                    "needs at least 2: pass the answers of all annotators, or use exact_match"
                )
        scores = [accuracy(said, answers) for said, answers in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}
