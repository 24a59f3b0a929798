"""Train a HiFICL adapter of an embedding model with Sentence Transformers: questions come to lie near their answers."""

import argparse

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

from peft_hificl import HiFICLConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="id or folder of an embedding model")
    parser.add_argument("--data", required=True, help="JSON lines with question and answer")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_train_epochs", type=float, default=10)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    options = parser.parse_args()

    model = SentenceTransformer(options.model)
    model.add_adapter(HiFICLConfig(task_type="FEATURE_EXTRACTION", n=8, r=8))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.num_train_epochs,
            learning_rate=options.learning_rate,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train").select_columns(
            ["question", "answer"]
        ),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    model.save_pretrained(options.output_dir)  # the adapter; SentenceTransformer(output_dir) loads the base, too


if __name__ == "__main__":
    main()
