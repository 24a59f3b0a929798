"""`python -m peft_hificl inspect`: the page of a small text model and of a small vision-language model."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from peft_hificl import HiFICLConfig, inspection
from peft_hificl.__main__ import main

from . import examples
from .examples import ASSISTANT, END, USER

PROMPT = f"{USER}Who looks after Halden?{END}{ASSISTANT}"


class Page(HTMLParser):
    """What a browser would load of a page, the cells of its tables by row, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "td" and data.strip():
            self.rows[-1][-1] += data
        self.text += data

    def pictures(self) -> list[bytes]:
        assert all(address.startswith("data:image/png;base64,") for address in self.loaded)
        return [base64.b64decode(address.partition(",")[2]) for address in self.loaded]


def save_adapter(base: tf.PreTrainedModel, folder: Path, seed: int, **kwargs: object) -> None:
    torch.manual_seed(seed)
    get_peft_model(base, HiFICLConfig(n=3, r=2, init_weights=False, **kwargs)).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    examples.save_chat_model(folder / "model")
    examples.save_vision_model(folder / "vlm")
    for seed in (1, 2):
        save_adapter(tf.AutoModelForCausalLM.from_pretrained(folder / "model"), folder / f"text.{seed}", seed)
    save_adapter(tf.AutoModelForImageTextToText.from_pretrained(folder / "vlm"), folder / "seeing", 1)
    base = tf.AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig()).save_pretrained(folder / "lora")
    shutil.copytree(folder / "text.1", folder / "elsewhere")
    config = json.loads((folder / "elsewhere" / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "LlamaForNothing", "parent_library": "transformers"}
    (folder / "elsewhere" / "adapter_config.json").write_text(json.dumps(config))
    Image.new("RGB", (8, 8), (200, 40, 40)).save(folder / "red.png")
    return folder


def test_a_page_on_two_adapters(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    adapters = [str(folder / "text.1"), str(folder / "text.2")]
    main(
        ["inspect", *adapters, "--base", str(folder / "model"), "--text", PROMPT, "--answer", "The", "--out", str(out)]
    )
    assert capsys.readouterr().out == f"{out}\n"
    page = Page(out)
    assert page.text.count("Share of the attention") == 2
    assert all(picture.startswith(b"\x89PNG") for picture in page.pictures()) and len(page.loaded) >= 4

    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder / "model"), adapters[0]).eval()
    prompt, answer = tokenizer(PROMPT)["input_ids"], tokenizer("The", add_special_tokens=False)["input_ids"]
    batch = {
        "input_ids": torch.tensor([prompt + answer]),
        "attention_mask": torch.ones(1, len(prompt + answer)),
        "labels": torch.tensor([[-100] * len(prompt) + answer]),
    }
    loss = model(**batch).loss.item()
    assert f"Loss of the answer: {loss:.3f} with the adapter" in page.text
    readings = inspection.read_pairs(model, [batch], tokenizer)
    rows = [row for row in page.rows if len(row) == 5 and row[0].startswith("model.")]
    assert rows[:12] == [
        [r.module, str(r.head), str(r.pair), f"{r.effect:+.4f}", " ".join(map(repr, r.words))] for r in readings
    ]
    similar = [row for row in page.rows if row[:1] == adapters[:1]]
    assert [row[:3] for row in similar] == [[*adapters, "keys"], [*adapters, "values"]]
    model.load_adapter(adapters[1], adapter_name="other")
    cosines = inspection.pair_similarity(model, "default", "other").values()
    best = torch.stack([found.keys.amax(dim=2).mean() for found in cosines]).mean()
    assert similar[0][3] == f"{best:.3f}"


def test_a_page_on_a_picture_with_the_models_own_answer(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    text = f"{USER}{examples.IMAGE}Which colour?{END}{ASSISTANT}"
    options = ["--base", str(folder / "vlm"), "--image", str(folder / "red.png"), "--text", text, "--out", str(out)]
    main(["inspect", str(folder / "seeing"), *options])
    page = Page(out)
    assert "image tokens" in page.text and "over the picture" in out.read_text()
    assert len(page.pictures()) >= 4

    processor = tf.AutoProcessor.from_pretrained(folder / "vlm")
    base = tf.AutoModelForImageTextToText.from_pretrained(folder / "vlm")
    model = PeftModel.from_pretrained(base, folder / "seeing").eval()
    inputs = processor(text=text, images=Image.open(folder / "red.png"), return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = "".join(processor.tokenizer.decode([token]) for token in said.tolist())
    assert answer in page.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": "nowhere"}, "Can't find 'adapter_config.json'"),
        ({"adapter": "lora"}, "lora is a LORA adapter, not a HiFICL one"),
        ({"adapter": "elsewhere"}, "elsewhere was trained on a LlamaForNothing, which transformers"),
        ({"--base": "nowhere"}, "nowhere"),
        ({"--image": "nowhere.png"}, "No such file or directory"),
        ({"--text": ""}, "--text has no tokens"),
        ({"--answer": ""}, "The answer has no tokens"),
        ({"--out": "nowhere/page.html"}, "No such file or directory"),
    ],
)
def test_a_users_error_is_one_line(
    folder: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--base": "model", "--out": "page.html", **{k: v for k, v in change.items() if k != "adapter"}}
    paths = {
        name: str(folder / value) if name in ("--base", "--out", "--image") else value for name, value in given.items()
    }
    paths.setdefault("--text", PROMPT)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "inspect",
                str(folder / change.get("adapter", "text.1")),
                *[part for pair in paths.items() for part in pair],
            ]
        )
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("python -m peft_hificl inspect: error: ") and message in line


def test_without_matplotlib_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib") or name.endswith((".plots", ".report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr(inspection, "report", raising=False)
    with pytest.raises(SystemExit):
        main(["inspect", str(folder / "text.1"), "--base", str(folder / "model"), "--text", PROMPT])
    assert "pip install 'peft-hificl[inspection]'" in capsys.readouterr().err


def test_the_command_line_lists_its_commands() -> None:
    command = [sys.executable, "-m", "peft_hificl"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert re.search(r"^\s+inspect\s+\S", helped.stdout, re.MULTILINE)
    bare = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bare.returncode == 2 and "COMMAND" in bare.stderr
