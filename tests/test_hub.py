"""Adapters on the Hub: the real client, in processes of its own, against a server on this machine (`hub`)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from .examples import save_chat_model
from .helpers import logits
from .hub import OWNER, Hub

ROOT = Path(__file__).parent.parent
IDS = torch.tensor([[5, 6, 7, 8]])
HEADING = "## How to use this HiFICL adapter\n"

START = """
import os, sys, urllib.error, urllib.request
import peft_hificl, torch
from datasets import Dataset
from huggingface_hub import HfApi, metadata_update, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft_hificl import HiFICLConfig, hotswap_adapter
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

found = {}
def base(name="me/base"):
    return AutoModelForCausalLM.from_pretrained(name).eval()
def config(seed, **kwargs):
    torch.manual_seed(seed)
    return HiFICLConfig(task_type="CAUSAL_LM", init_weights=False, **kwargs)
def keep(name, model):
    with torch.no_grad():
        found[name] = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        lines = []
        while error is not None:
            lines.append(f"{type(error).__name__}: {error}".replace("\\n", " "))
            error = error.__cause__ or error.__context__
        print(" <- ".join(lines))
    else:
        print("no error")
def mark(name):
    try:
        urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/mark/{name}")
    except urllib.error.HTTPError:
        pass
"""
END = """
save_file(found, sys.argv[1])
"""


class Place:
    """The hub, and a folder for the caches of the processes that use it."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.found: dict[str, Tensor] = {}

    def run(self, code: str, *, home: str, token: str | None = None, offline: bool = False) -> str:
        """What a process prints; `found` has what it has kept, the hub's `requests` those that it has made."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables |= {
            "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / home), "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), **({"HF_TOKEN": token} if token else {}),
        }  # fmt: skip
        self.hub.requests.clear()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", START + textwrap.dedent(code) + END, str(self.folder / "found")],
            env=variables, cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.found = load_file(self.folder / "found")
        return done.stdout

    def stored(self, repository: str, revision: str = "main", subfolder: str = "") -> Tensor:
        """The logits of an adapter, read from the files that the hub has."""
        folder = self.folder / "copies" / repository / revision
        for name, content in self.hub.repositories[repository].files(revision).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        base = AutoModelForCausalLM.from_pretrained(self.folder / "base")
        return logits(PeftModel.from_pretrained(base, folder / subfolder), input_ids=IDS)

    def card(self, repository: str) -> tuple[dict, str]:
        _, data, text = self.hub.repositories[repository].files()["README.md"].decode().split("---\n", 2)
        return yaml.safe_load(data), text


PUSH = """
model = get_peft_model(base(), config(1, n=3, r=2))
model.push_to_hub("me/adapter")
api = HfApi()
api.create_tag("me/adapter", tag="v1")
metadata_update("me/adapter", {"license": "mit", "model-index": [{"name": "ports", "results": [{
    "task": {"type": "text-generation"}, "dataset": {"type": "ports", "name": "Ports"},
    "metrics": [{"type": "accuracy", "value": 0.75}],
}]}]})
get_peft_model(base(), config(2, n=7, r=2)).push_to_hub("me/adapter", tags=["ports"])
get_peft_model(base(), config(3)).push_to_hub("me/adapter", revision="trial")

model = get_peft_model(base(), config(4))
model.add_adapter("captions", config(5, n=5))
model.push_to_hub("me/two")

get_peft_model(base(), config(6)).push_to_hub("me/secret", private=True)

own = base()
own.add_adapter(config(7))
own.push_to_hub("me/own")

gated = get_peft_model(base(), config(8))
gated.peft_config["default"].base_model_name_or_path = "big/base"
gated.push_to_hub("me/on-gated")

local = base(str(sys.argv[1]).replace("found", "base"))
get_peft_model(local, config(9)).push_to_hub("me/of-a-folder")

rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "labels": [[5, 6, 7, 8]]})
arguments = TrainingArguments(
    "out", max_steps=1, use_cpu=True, report_to=[], save_strategy="no", push_to_hub=True, hub_model_id="me/trained",
)
trainer = Trainer(get_peft_model(base(), config(10)), arguments, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
trainer.push_to_hub()

lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
get_peft_model(base(), lora).push_to_hub("me/lora")
get_peft_model(base(), lora, adapter_name="inner").push_to_hub("me/lora-inner")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub")
    save_chat_model(folder / "base")
    files = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    with Hub() as hub:
        hub.add("me/base", files)
        hub.add("big/base", files, gated=True)
        found = Place(hub, folder)
        found.run(PUSH, home="author", token=OWNER)
        yield found


# -- what is pushed --------------------------------------------------------------------------------------------------


def test_what_the_hub_receives(place: Place) -> None:
    for name, repository in place.hub.repositories.items():
        if name.startswith("me/") and name not in ("me/base", "me/lora-inner", "me/ports"):
            assert set(repository.files()) >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}, name
    assert "captions/adapter_model.safetensors" in place.hub.repositories["me/two"].files()
    assert place.hub.repositories["me/secret"].private
    assert set(place.hub.repositories["me/adapter"].refs) == {"main", "v1", "trial"}


def test_the_cards_metadata(place: Place) -> None:
    """As PEFT writes it, although transformers' `push_to_hub` replaces PEFT's card by one of its own."""
    for name in ("me/two", "me/secret", "me/own", "me/trained"):
        data, text = place.card(name)
        assert data["library_name"] == "peft" and data["base_model"] == "me/base" and "hificl" in data["tags"], name
        assert text.count(HEADING) == 1, name
    assert "achieves the following results on the evaluation set:\n- Loss:" in text  # the trainer's own
    data, text = place.card("me/secret")
    assert data["tags"] == ["base_model:adapter:me/base", "transformers", "hificl"]
    assert data["pipeline_tag"] == "text-generation"
    assert "8 virtual key-value pairs per attention head, rank 8, 3,072 parameters" in text


def test_what_the_author_has_written_survives_the_next_push(place: Place) -> None:
    data, text = place.card("me/adapter")
    assert data["license"] == "mit"
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert {"hificl", "ports", "transformers"} <= set(data["tags"])
    assert text.count(HEADING) == 1 and "7 virtual key-value pairs" in text and "3 virtual key-value" not in text


def test_a_base_model_from_a_folder_is_not_named_to_the_hub(place: Place) -> None:
    """It would refuse the card, and with it the whole commit."""
    data, _ = place.card("me/of-a-folder")
    assert "base_model" not in data and data["tags"] == ["transformers", "hificl"]


def test_the_card_of_a_lora_is_left_alone(place: Place) -> None:
    data, text = place.card("me/lora")
    assert data["library_name"] == "transformers" and "HiFICL" not in text


# -- loading ---------------------------------------------------------------------------------------------------------

LOAD = """
keep("main", PeftModel.from_pretrained(base(), "me/adapter"))
keep("tag", PeftModel.from_pretrained(base(), "me/adapter", revision="v1"))
model = PeftModel.from_pretrained(base(), "me/adapter", revision="trial")
keep("branch", model)
two = snapshot_download("me/two") if HF_HUB_OFFLINE else "me/two"  # offline, PEFT finds no subfolder of an id
model.load_adapter(two, "captions", subfolder="captions")
model.set_adapter("captions")
keep("subfolder", model)
keep("commit", PeftModel.from_pretrained(base(), "me/adapter", revision=COMMIT))
keep("auto", AutoPeftModelForCausalLM.from_pretrained("me/two"))
model = base()
model.load_adapter("me/own")
keep("own", model)
model = base()
model.load_adapter("me/adapter", adapter_kwargs={"revision": "v1"})
keep("own-tag", model)
model = base()
model.load_adapter("me/two", adapter_kwargs={"subfolder": "captions"})
keep("own-subfolder", model)
keep("by-transformers", AutoModelForCausalLM.from_pretrained("me/two"))
model = PeftModel.from_pretrained(base(), "me/two")
hotswap_adapter(model, "me/secret", "default", token=TOKEN)
keep("hotswap", model)
if HF_HUB_OFFLINE:
    model = base()
    error(PeftModel.from_pretrained, model, "me/two", subfolder="captions")
    keep("without", model)
    error(PeftModel.from_pretrained, base(), "me/lora-inner", subfolder="inner")
else:
    PeftModel.from_pretrained(base(), "me/lora-inner", subfolder="inner")
"""
CASES = {
    "main": ("me/adapter",), "tag": ("me/adapter", "v1"), "branch": ("me/adapter", "trial"),
    "subfolder": ("me/two", "main", "captions"), "commit": ("me/adapter", "v1"), "auto": ("me/two",),
    "own": ("me/own",), "own-tag": ("me/adapter", "v1"), "own-subfolder": ("me/two", "main", "captions"),
    "by-transformers": ("me/two",), "hotswap": ("me/secret",),
}  # fmt: skip


def test_revisions_subfolders_and_every_way_to_load_then_offline(place: Place) -> None:
    commit = place.hub.repositories["me/adapter"].refs["v1"]
    code = LOAD.replace("COMMIT", repr(commit)).replace("TOKEN", repr(OWNER))
    want = {name: place.stored(*case) for name, case in CASES.items()}
    assert len({str(value) for value in want.values()}) == 7  # adapters differ
    for offline in (False, True):
        out = place.run(code, home="user", offline=offline)
        if offline:
            assert [line.partition(":")[0] for line in out.splitlines()] == ["LocalEntryNotFoundError"] * 2
            want["without"] = logits(AutoModelForCausalLM.from_pretrained(place.folder / "base"), input_ids=IDS)
        assert place.found.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(place.found[name], value, rtol=1e-5, atol=1e-5)
        assert bool(place.hub.requests) is not offline


NOT_CACHED = """
model = base(str(sys.argv[1]).replace("found", "base"))
error(PeftModel.from_pretrained, model, "me/adapter")
error(PeftModel.from_pretrained, model, "me/adapter", config=config(1, target_modules=["self_attn"]))
error(model.load_adapter, "me/adapter")
assert not [name for name, _ in model.named_modules() if "virtual_pairs" in name]
"""


def test_what_is_not_in_the_cache_is_told_by_the_hubs_error(place: Place) -> None:
    config, weights, own = place.run(NOT_CACHED, home="elsewhere", offline=True).splitlines()
    assert "Can't find 'adapter_config.json' at 'me/adapter'" in config
    for line in (config, weights):
        assert "LocalEntryNotFoundError" in line
    assert "adapter model file not found in me/adapter" in own
    assert place.hub.requests == []


LOADS = """
for turn, options in (("first", {}), ("again", {}), ("forced", {"force_download": True})):
    for name in ("me/secret", "me/lora"):
        model = base()
        mark(f"{turn}/{name}")
        PeftModel.from_pretrained(model, name, token=TOKEN, **options)
        mark("end")
        model = PeftModel.from_pretrained(base(), "me/lora" if name == "me/lora" else "me/two")
        mark(f"{turn}-second/{name}")
        model.load_adapter(name, "b", token=TOKEN, **options)
        mark("end")
    for name in ("me/own", "me/lora"):
        model = base()
        mark(f"{turn}-own/{name}")
        model.load_adapter(name, adapter_kwargs={"cache_dir": "own", **options})
        mark("end")
"""


def test_a_load_asks_the_hub_as_often_as_that_of_a_lora(place: Place) -> None:
    place.run(LOADS.replace("TOKEN", repr(OWNER)), home="counting")
    commit = place.hub.repositories["me/secret"].refs["main"]  # what was checked, and not what may have come since
    assert ("HEAD", f"/me/secret/resolve/{commit}/adapter_model.safetensors", 200) in place.hub.requests
    asked: dict[str, list[tuple[str, str]]] = {}
    turn, repository = "", ""
    for method, path, _ in place.hub.requests:
        if path.startswith("/mark/"):
            _, _, turn, repository = [*path.split("/", 3), ""][:4]
            asked.setdefault(f"{turn} {'lora' if 'lora' in repository else 'hificl'}", [])
        elif repository and f"{repository}/" in f"{path}/":
            kind = "lora" if "lora" in repository else "hificl"
            asked[f"{turn} {kind}"].append((method, path.rpartition("/")[2].replace(repository.rpartition("/")[2], "")))
    turns = {key.rpartition(" ")[0] for key in asked} - {"end"}
    assert len(turns) == 9
    for turn in turns:
        ours, theirs = sorted(asked[f"{turn} hificl"]), sorted(asked[f"{turn} lora"])
        assert ours == theirs, turn
    weights = [("GET", "adapter_model.safetensors"), *[("HEAD", "adapter_model.safetensors")] * 2]
    assert [request for request in sorted(asked["first hificl"]) if "model" in request[1]] == weights


def test_the_guide_as_written(place: Place) -> None:
    """Its name for a base model stands for a tiny one."""
    files = {path.name: path.read_bytes() for path in (place.folder / "base").iterdir()}
    place.hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", files)
    blocks = MarkdownIt().parse((ROOT / "docs/guides/hub.md").read_text())
    code = "".join(block.content for block in blocks if block.type == "fence" and block.info == "python")
    place.run(code, home="reader", token=OWNER)
    ports = place.hub.repositories["me/ports"]
    assert ports.private and set(ports.refs) == {"main", "v1", "trial"}
    assert "short/adapter_model.safetensors" in ports.files("trial")
    assert {"config.json", "tokenizer.json", "adapter_model.safetensors"} <= ports.files().keys()
    data, text = place.card("me/ports")
    assert data["license"] == "apache-2.0" and data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75 and text.count(HEADING) == 1


# -- private and gated -----------------------------------------------------------------------------------------------

REFUSED = """
model = base()
before = {name: type(module) for name, module in model.named_modules()}
error(PeftModel.from_pretrained, model, "me/secret")
error(PeftModel.from_pretrained, model, "me/secret", token="hf_other")
error(model.load_adapter, "me/secret")
error(PeftModel.from_pretrained, model, "me/secret", config=config(1, target_modules=["self_attn"]))
error(PeftModel.from_pretrained, model, "me/base", config=config(1, target_modules=["self_attn"]))
assert {name: type(module) for name, module in model.named_modules()} == before
keep("secret", PeftModel.from_pretrained(model, "me/secret", token=TOKEN))
error(AutoPeftModelForCausalLM.from_pretrained, "me/on-gated")
error(get_peft_model(base(), config(1)).push_to_hub, "me/adapter", token="hf_other")
keep("gated", AutoPeftModelForCausalLM.from_pretrained("me/on-gated", token=TOKEN))
"""


def test_private_and_gated(place: Place) -> None:
    before = place.hub.repositories["me/adapter"].refs.copy()
    out = place.run(REFUSED.replace("TOKEN", repr(OWNER)), home="stranger").splitlines()
    secret, other, own, weights, none, gated, push = out
    for line in (secret, other):
        assert "Can't find 'adapter_config.json' at 'me/secret'" in line and "RepositoryNotFoundError" in line
    assert "401" in secret and "404" in other
    assert "me/secret" in own
    assert "RepositoryNotFoundError" in weights and "me/secret" in weights
    assert none.startswith("ValueError: There is no adapter_model.safetensors in 'me/base/' on the Hub: push")
    assert "gated repo" in gated and "big/base" in gated
    assert "403" in push and place.hub.repositories["me/adapter"].refs == before
    torch.testing.assert_close(place.found["secret"], place.stored("me/secret"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(place.found["gated"], place.stored("me/on-gated"), rtol=1e-5, atol=1e-5)
