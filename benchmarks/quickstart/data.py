"""Real images and the questions asked about them: the 1,797 handwritten digits that scikit-learn carries."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

IMAGE_SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Task:
    """A question asked about every image, and the one-word answer for each digit from 0 to 9."""

    title: str
    question: str
    answers: tuple[str, ...]


NAMING = Task("which digit", "<image> which digit ?", DIGITS)  # what the base model is trained on

# What it is not trained on, by the folder names of the adapters.
NEW_TASKS = {
    "parity": Task("odd or even", "<image> blick or dax ?", ("blick", "dax") * 5),
    "successor": Task("digit + 1", "<image> which digit comes next ?", (*DIGITS[1:], DIGITS[0])),
}


def load_splits() -> DatasetDict:
    """Four disjoint splits, stratified by digit, always the same.

    base: trains the base model; adapters: trains the adapters, with images new to the base model; validation: chooses
    learning rates; test: reported, never used for a choice.
    """
    digits = load_digits()
    images = [
        Image.fromarray((pixels * (255 / 16)).astype("uint8")).resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
        )
        for pixels in digits.images  # 8 x 8, 17 shades of grey
    ]
    features = Features({"image": ImageFeature(mode="RGB"), "digit": ClassLabel(names=list(DIGITS))})
    rest = Dataset.from_dict({"image": images, "digit": digits.target.tolist()}, features=features)

    splits = DatasetDict()
    for name, size in (("test", 360), ("validation", 240), ("adapters", 300)):
        parts = rest.train_test_split(test_size=size, stratify_by_column="digit", seed=0)
        rest, splits[name] = parts["train"], parts["test"]
    splits["base"] = rest
    return splits
