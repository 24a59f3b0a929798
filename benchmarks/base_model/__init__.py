"""A small vision-language base model that learns in context, made on the spot because no weights can be downloaded.

`python -m benchmarks.base_model.train` builds it from nothing, `python -m benchmarks.base_model.evaluate` measures it
on test images and on rules that training never showed.

Read in this order: `scenes` (pictures), `language` (questions, answers, captions), `episodes` (prompts of several
pictures, and the rules that are held out), `model`, `train`, `evaluate`.
"""
