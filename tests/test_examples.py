"""The commands of examples/README.md on tiny models: what they train, save, load, and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf
from peft import PeftModel
from PIL import Image

from . import examples
from .examples import ASSISTANT, ENOUGH, FOLDER, IMAGE, USER, command, first_loss, losses, rows, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat model, and two adapters of it that `train_text.py` has made."""
    folder = tmp_path_factory.mktemp("examples")
    examples.save_chat_model(folder / "model")
    for name in ("ports", "owners"):
        (folder / f"{name}.txt").write_text(run(command(f"--output_dir adapters/{name}"), folder, ENOUGH))
    return folder


def answer(folder: Path, question: str, adapter: str | None = None) -> str:
    """Of the base model with one adapter or none, to one question."""
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "model")
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    if adapter:
        model = PeftModel.from_pretrained(model, folder / "adapters" / adapter).eval()
    inputs = tokenizer(f"{USER}{question}{examples.END}{ASSISTANT}", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_readme_has_a_command_for_each_example() -> None:
    assert {line.split()[0] for line in examples.COMMANDS} == {f"examples/{p.name}" for p in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", ["ports", "owners"])
def test_train_text(name: str, folder: Path) -> None:
    learned = rows(name)
    printed = (folder / f"{name}.txt").read_text()
    assert printed.endswith("".join(f"{row['question']} {row['answer']}\n" for row in learned))
    assert "trainable params: 3,072 " in printed
    assert answer(folder, learned[1]["question"], name) == learned[1]["answer"]
    assert answer(folder, learned[1]["question"]) != learned[1]["answer"]

    saved = {path.name for path in (folder / "adapters" / name).iterdir()}
    assert saved >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    first, *_, last = losses(folder / "adapters" / name)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "model")
    prompts = [f"{USER}{row['question']}{examples.END}{ASSISTANT}" for row in learned]
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    base = tf.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert first == pytest.approx(first_loss(base, inputs, [row["answer"] for row in learned]), abs=1e-5)
    assert last < first / 4


def test_train_sharded(folder: Path) -> None:
    """On one process; tests/integration/test_sharded_scripts.py has all ways of several."""
    printed = run(command("train_sharded"), folder, "--epochs 150 --learning_rate 0.1")
    first, *_, last = (float(line.removeprefix("loss ")) for line in printed.splitlines() if line.startswith("loss "))
    assert last < first / 4
    learned = rows("owners")[1]
    assert answer(folder, learned["question"], "sharded") == learned["answer"]


def test_switch_adapters(folder: Path) -> None:
    question = "Who looks after Halden?"
    want = {name: answer(folder, question, name) for name in ("ports", "owners")}
    assert want["ports"] != want["owners"] == "The storage team."
    printed = run(command("switch_adapters"), folder)
    want["base model"] = answer(folder, question)
    assert printed == "".join(f"{name}: {text}\n" for name, text in want.items())


def test_mixed_batch(folder: Path) -> None:
    asked = {
        "ports": "Tansy's port?",
        "owners": "Whom do I ask about Mirren?",
        "__base__": "Whom do I ask about Mirren?",
    }
    printed = run(command("mixed_batch"), folder)
    alone = [
        f"{name}: {question} {answer(folder, question, None if name == '__base__' else name)}\n"
        for name, question in asked.items()
    ]
    assert printed == "".join(alone)
    assert alone[0].endswith("6188\n") and alone[1].endswith("The search team.\n") and len(set(alone)) == len(alone)


def test_train_vlm(tmp_path: Path) -> None:
    examples.save_vision_model(tmp_path / "vlm")
    printed = run(command("train_vlm"), tmp_path, ENOUGH)
    learned = rows("paints")
    assert printed.endswith("".join(f"{row['image']} {row['question']} {row['answer']}\n" for row in learned))
    saved = {path.name for path in (tmp_path / "adapters" / "paints").iterdir()}
    assert saved >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}

    first, *_, last = losses(tmp_path / "adapters" / "paints")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "vlm")
    inputs = [
        processor(
            text=f"{USER}{IMAGE}{row['question']}{examples.END}{ASSISTANT}",
            images=[Image.open(FOLDER / "data" / row["image"])],
            return_tensors="pt",
        )
        for row in learned
    ]
    base = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    assert first == pytest.approx(first_loss(base, inputs, [row["answer"] for row in learned]), abs=1e-5)
    assert last < first / 4
