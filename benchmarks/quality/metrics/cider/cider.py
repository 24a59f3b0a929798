"""CIDEr (Vedantam et al. 2015) as `pycocoevalcap` computes it for the COCO captions.

The mean over the captions of 10 times the similarity of their n-grams, n = 1 to 4, to those of the references. This is
the scorer's own scale, on which the HiFICL paper reports 1.33 for COCO; others print 100 times that.

Captions are split at blanks. The tokenizer of `pycocoevalcap`, which needs Java, is not used: captions must come in
lower case and without punctuation.

N-grams are weighted by how few pictures' references have them, so a value belongs to the whole set of pictures: means
over parts of it differ, and with a single picture every weight, and the value, is 0.
"""

import datasets
import evaluate
from pycocoevalcap.cider import cider

TEXT = datasets.Value("string")


class Cider(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015",
            inputs_description="`predictions`: a caption for each picture; `references`: for each, its true captions.",
            features=datasets.Features({"predictions": TEXT, "references": datasets.Sequence(TEXT)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if not predictions:
            raise ValueError("cider got 0 predictions; pass at least one")
        for row, captions in enumerate(references):
            if not captions:
                raise ValueError(f"references[{row}] is empty; cider needs at least one true caption for each picture")
        mean, _ = cider.Cider().compute_score(
            dict(enumerate(references)), {row: [said] for row, said in enumerate(predictions)}
        )
        return {"cider": float(mean)}
