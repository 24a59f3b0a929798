"""CHAIR, how much captions hallucinate (Rohrbach et al. 2018, Object Hallucination in Image Captioning), and recall.

    chair_i = mentions of objects that are not in the picture / mentions of objects
    chair_s = captions with at least one such mention / captions
    recall  = objects of a picture that its caption mentions / objects of a picture, both summed over the pictures

As in the authors' script, chair_i counts a word as often as the caption says it. Recall, which is not in that paper
but is reported beside it, counts each object of a picture once. Where no caption mentions any object, chair_i is 0:
nothing is hallucinated, and recall tells what is missing.

Predictions are the mentions, not the captions. Which word names an object is the caller's to say: "two" may be a digit
in the picture, or only count something else. Mentions and objects must use one name for one object.
"""

import datasets
import evaluate

WORDS = datasets.Sequence(datasets.Value("string"))


class Chair(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Rohrbach et al., Object Hallucination in Image Captioning, EMNLP 2018",
            inputs_description="`predictions`: the objects that each caption mentions, repeats included; "
            "`references`: the objects of each picture.",
            features=datasets.Features({"predictions": WORDS, "references": WORDS}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        if not predictions:
            raise ValueError("chair got 0 predictions; pass at least one")
        if not any(references):
            raise ValueError(
                f"none of the {len(references)} references has an object; pass the objects of each picture"
            )
        pairs = [(said, set(true)) for said, true in zip(predictions, references, strict=True)]
        false = [sum(word not in true for word in said) for said, true in pairs]
        return {
            "chair_i": sum(false) / max(1, sum(len(said) for said, _ in pairs)),
            "chair_s": sum(number > 0 for number in false) / len(false),
            "recall": sum(len(true & set(said)) for said, true in pairs) / sum(len(true) for _, true in pairs),
        }
