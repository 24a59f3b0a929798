"""`transformers serve`, started by the launcher: answers over HTTP are those of `generate`."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..examples import save_chat_model
from ..helpers import config
from ..hub import Hub

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package)
pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "transformers-serve.md").read_text()
LINKS, SERVE, ASK = [b.content for b in MarkdownIt().parse(PAGE) if b.type == "fence" and b.info == "bash"]
PYTHON, *WORDS = shlex.split(SERVE)
QUESTIONS = ["Which port has http?", "Which port has https?", "Port of ssh", "Which port has http? And ftp?"]
TOKENS = 12


@dataclass
class Server:
    folder: Path
    port: int

    def post(self, model: str, question: str, **options: object) -> bytes:
        body = {"model": model, "max_tokens": TOKENS, "temperature": 0, **options}
        body["messages"] = [{"role": "user", "content": question}]
        request = urllib.request.Request(
            f"http://localhost:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def ask(self, model: str, question: str) -> str:
        return json.loads(self.post(model, question))["choices"][0]["message"]["content"]

    def generated(self, adapter: str | None, question: str) -> str:
        """What `generate` answers in this process."""
        words = AutoTokenizer.from_pretrained(self.folder / "base")
        model = AutoModelForCausalLM.from_pretrained(self.folder / "base")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, self.folder / adapter)
        inputs = words.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return words.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def serving(folder: Path, words: list[str], **variables: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *words, "--port", str(port)],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            for _ in range(120):
                assert process.poll() is None, (folder / "log").read_text()
                try:
                    with urllib.request.urlopen(f"http://localhost:{port}/health"):
                        break
                except OSError:
                    time.sleep(0.5)
            yield Server(folder, port)
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    save_chat_model(folder / "base")
    for seed, name in enumerate(("adapter", "other")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, config(task_type="CAUSAL_LM")).save_pretrained(folder / name)
    for commands in (LINKS, LINKS.replace("adapter/", "other/").replace("served", "served-other")):
        subprocess.run(["bash", "-ec", commands], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module", params=["continuous", "one by one"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    words = WORDS
    if request.param == "continuous":
        words = [*words, "--cb-block-size", "4"]  # small enough for these prompts to fill some
    else:
        words = words[: words.index("--continuous-batching")]
    with serving(folder, words) as found:
        yield found


def test_answers_are_those_of_generate(server: Server) -> None:
    """Of two adapters and the base in turn, with one prompt: none is answered from another's cache."""
    places = {"served": "adapter", "served-other": "other", "base": None}
    want = {model: server.generated(adapter, QUESTIONS[0]) for model, adapter in places.items()}
    assert len(set(want.values())) == 3
    for model in ("served", "served-other", "base", "served"):
        assert server.ask(model, QUESTIONS[0]) == want[model]
        assert server.ask(model, QUESTIONS[0]) == want[model]


def test_several_requests_at_once(server: Server) -> None:
    want = [server.generated("adapter", question) for question in QUESTIONS]
    assert len(set(want)) == len(want)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda question: server.ask("served", question), QUESTIONS * 2)) == want * 2


def test_streamed(server: Server) -> None:
    lines = server.post("served", QUESTIONS[1], stream=True).decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert text == server.generated("adapter", QUESTIONS[1])


def test_the_command_of_the_guide(server: Server) -> None:
    command = ASK.replace("8000", str(server.port))
    done = subprocess.run(["bash", "-ec", command], capture_output=True, check=True)
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert answer == server.generated("adapter", QUESTIONS[0])


def test_an_adapter_on_the_hub(folder: Path) -> None:
    """Beside its base model's configuration and tokenizer."""
    base = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    adapter = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    named = json.loads(adapter["adapter_config.json"]) | {"base_model_name_or_path": "me/base"}
    beside = {name: content for name, content in base.items() if not name.startswith(("model", "generation"))}
    with Hub() as hub:
        hub.add("me/base", base)
        hub.add("me/ports", {**beside, **adapter, "adapter_config.json": json.dumps(named).encode()})
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
        with serving(folder, WORDS, **variables, HF_HUB_DISABLE_XET="1") as server:
            assert server.ask("me/ports", QUESTIONS[0]) == server.generated("adapter", QUESTIONS[0])
