"""The usage section of model cards: on the Hub, under cards that others write, and whatever stops a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model

from peft_hificl import HiFICLConfig

from .helpers import adapted, build, config, fresh, trainer

HEADING = "## How to use this HiFICL adapter\n"
CARD = ModelCard("---\nlicense: mit\n---\n# Mine\n")
NAMED = "## How to use the HiFICL adapter {}\n"


class Hub:
    """What the Hub would hold: the files of each repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **kwargs: object) -> SimpleNamespace:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list, **kwargs: object) -> None:
        for operation in operations:
            path = self.folder / repo_id / operation.path_in_repo
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(Path(operation.path_or_fileobj).read_bytes())

    def download(self, repo_id: str, filename: str, **kwargs: object) -> str:
        path = self.folder / repo_id / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {filename} in {repo_id}")
        return str(path)

    def card(self, repo_id: str) -> str:
        return (self.folder / repo_id / "README.md").read_text()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **kwargs: hub.create_repo(*args, **kwargs))
    monkeypatch.setattr(HfApi, "create_commit", lambda api, *args, **kwargs: hub.create_commit(*args, **kwargs))
    monkeypatch.setattr(huggingface_hub.repocard, "hf_hub_download", hub.download)
    return hub


def run_snippet(card: str, folder: Path) -> str:
    """Run the snippet of a card, where it says that it runs."""
    snippet = card.partition("```python")[2].partition("```")[0]
    code = f"{snippet}\nprint(type(model).__name__, type(model.get_base_model()).__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


# -- pushed to the Hub -----------------------------------------------------------------------------------------------


def test_a_pushed_model_tells_how_to_load_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build("vlm").save_pretrained("base")
    base = transformers.LlavaForConditionalGeneration.from_pretrained("base")
    model = get_peft_model(base, config(task_type="CAUSAL_LM"))
    model.push_to_hub("me/adapter")
    card = hub.card("me/adapter")
    assert card.count(HEADING) == 1 and "library_name" in card and "import peft_hificl" in card
    assert {path.name for path in (hub.folder / "me/adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert "PeftModelForCausalLM LlavaForConditionalGeneration" in run_snippet(card, hub.folder / "me/adapter")
    # Again, another one, over a card that its author has gone on with.
    (hub.folder / "me/adapter/README.md").write_text(card + "\n### Results\n\nGood.\n")
    get_peft_model(model.unload(), config(n=7)).push_to_hub("me/adapter")
    card = hub.card("me/adapter")
    assert card.count(HEADING) == 1 and "\n### Results\n\nGood." in card
    assert "7 virtual key-value pairs" in card and "3 virtual key-value pairs" not in card


def test_named_adapters_that_are_pushed(hub: Hub) -> None:
    model = adapted("gqa")
    model.add_adapter("captions", config(n=5))
    model.push_to_hub("me/two")
    card = hub.card("me/two")
    assert card.count(HEADING) == card.count(NAMED.format("captions")) == 1
    assert (hub.folder / "me/two/captions/adapter_model.safetensors").is_file()
    assert "subfolder='captions')" in card
    # One beside adapters that are there already.
    adapted("gqa", name="vqa").push_to_hub("me/two")
    card = hub.card("me/two")
    assert card.count(NAMED.format("vqa")) == 1 and card.count("## How to use") == 3


def test_a_lora_beside_it_is_not_spoken_of(hub: Hub) -> None:
    lora = get_peft_model(build("gqa"), LoraConfig(target_modules=["q_proj"]))
    lora.push_to_hub("me/lora")
    assert "HiFICL" not in hub.card("me/lora")
    lora.get_base_model().add_adapter(config(), "pairs")  # PEFT saves both
    lora.push_to_hub("me/lora")
    card = hub.card("me/lora")
    assert card.count("## How to use") == card.count(NAMED.format("pairs")) == 1


@pytest.mark.parametrize("push", ["push_to_hub", "save_pretrained"])
def test_an_adapter_of_transformers_own_that_is_pushed(push: str, hub: Hub, tmp_path: Path) -> None:
    base = build("gqa")
    base.add_adapter(config(), "pairs")
    if push == "push_to_hub":
        base.push_to_hub("me/own")
    else:
        base.save_pretrained(tmp_path / "own", push_to_hub=True, repo_id="me/own")
    card = hub.card("me/own")
    assert card.count(HEADING) == 1 and "LlamaForCausalLM.from_pretrained" in card


def test_a_configuration_that_is_pushed(hub: Hub) -> None:
    HiFICLConfig(task_type="CAUSAL_LM", n=5).push_to_hub("me/config")
    card = hub.card("me/config")
    assert card.count(HEADING) == 1 and "5 virtual key-value pairs" in card
    assert "import AutoModelForCausalLM" in card


# -- cards that others write -----------------------------------------------------------------------------------------


def test_a_trainers_card_keeps_it(tmp_path: Path) -> None:
    training = trainer(tmp_path, fresh(), save_strategy="steps", save_steps=4)
    training.train()
    training.save_model()
    training.create_model_card(model_name="pictures")
    card = (tmp_path / "README.md").read_text()
    assert "# pictures" in card and card.count("## How to use") == card.count(HEADING) == 1
    assert "LlavaForConditionalGeneration.from_pretrained" in card  # a class that its task type would not tell
    assert (tmp_path / "checkpoint-4" / "README.md").read_text().count(HEADING) == 1


def test_a_card_elsewhere_is_written_as_ever(tmp_path: Path) -> None:
    HiFICLConfig().save_pretrained(tmp_path)
    for path in ("CARD.md", "new/folder/README.md"):
        CARD.save(tmp_path / path)
        assert (tmp_path / path).read_text() == str(CARD)


@pytest.mark.parametrize("text", ['{"peft_type": "HIF', "[]", '{"peft_type": "HIFICL"}', '"HIFICL"', "\xe9"])
def test_a_card_beside_a_damaged_configuration_is_written_as_ever(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    CARD.save(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == str(CARD)


def test_a_card_beside_a_configuration_of_strange_values(tmp_path: Path) -> None:
    strange = dict.fromkeys(["n", "r", "task_type", "auto_mapping", "base_model_name_or_path"], 5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "HIFICL", **strange}))
    CARD.save(tmp_path / "README.md")
    assert HEADING in (tmp_path / "README.md").read_text()


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_readme_that_is_not_utf_8_is_left_alone(tmp_path: Path) -> None:
    text = "---\nlibrary_name: peft\n---\nTrès utile\n".encode("latin-1")
    (tmp_path / "README.md").write_bytes(text)
    HiFICLConfig().save_pretrained(tmp_path)
    HiFICLConfig().save_pretrained(tmp_path / "named")
    assert (tmp_path / "README.md").read_bytes() == text
    base = build("gqa")
    base.add_adapter(config())
    base.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == text


def test_line_ends_permissions_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    target, link = tmp_path / "docs" / "card.md", tmp_path / "README.md"
    target.write_bytes(b"---\r\nlibrary_name: peft\r\n---\r\n# Mine\r\n")
    target.chmod(0o640)
    link.symlink_to(target)
    HiFICLConfig().save_pretrained(tmp_path)
    text = target.read_bytes()
    assert HEADING.strip().encode() in text and text.count(b"\n") == text.count(b"\r\n")
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert {path.name for path in target.parent.iterdir()} == {"card.md"}


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from peft_hificl import HiFICLConfig
from tests.helpers import adapted

folder = Path(sys.argv[1])
model = adapted("gqa")
model.save_pretrained(folder)
readme = folder / "README.md"
notes = "What its author writes. " * 100_000
readme.write_text(readme.read_text() + notes)
random.seed(0)
for _ in range(12):
    child = os.fork()
    if child == 0:
        while True:
            model.save_pretrained(folder)
    time.sleep(random.uniform(0.05, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    card = readme.read_text()
    assert card.count("## How to use this HiFICL adapter") == 1 and card.rstrip().endswith(notes.rstrip()), len(card)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_card_outlives_a_process_that_is_killed_while_it_saves(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "adapter")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
