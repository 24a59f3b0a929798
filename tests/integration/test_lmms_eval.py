"""lmms-eval with the plugin: found by its entry point, and its answers are those of the adapted model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..examples import save_vision_model
from ..helpers import config
from .frameworks import ROOT

pytest.importorskip("lmms_eval.evaluator", exc_type=ImportError)
pytestmark = pytest.mark.integration


def test_answers_are_those_of_the_adapted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = shutil.copytree(ROOT / "integrations" / "lmms_eval", tmp_path / "package")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
         str(tmp_path / "site"), str(package)],
        check=True,
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert [e.name for e in entry_points(group="lmms_eval.models")] == ["hificl"]
    asked = "from lmms_eval.models import list_available_models; assert 'hificl_llava_hf' in list_available_models()"
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "site", ROOT)))}
    subprocess.run([sys.executable, "-c", asked], check=True, env=here)
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    MODEL_REGISTRY_V2.load_entrypoint_manifests()  # this process has looked before

    save_vision_model(tmp_path / "base")
    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    get_peft_model(base, config()).save_pretrained(tmp_path / "adapter")
    line = f"pretrained={tmp_path / 'base'},peft={tmp_path / 'adapter'},device=cpu,device_map=cpu"
    evaluated: Any = get_model("hificl_llava_hf").create_from_arg_string(line)
    picture = Image.new("RGB", (8, 8), "red")
    content = [{"type": "image", "url": picture}, {"type": "text", "text": "Which port?"}]
    evaluated.task_dict = {"task": {"test": [None]}}
    settings = {"max_new_tokens": 8, "until": []}
    arguments = ("context", lambda document: [{"role": "user", "content": content}], settings, 0, "task", "test")
    (found,) = evaluated.generate_until(
        [
            Instance(
                request_type="generate_until",
                arguments=arguments,
                idx=0,
                metadata={"task": "task", "doc_id": 0, "repeats": 1},
            )
        ]
    )

    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    parts = [{"type": "image"}, {"type": "text", "text": "Which port?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    answers = []
    for adapter in (tmp_path / "adapter", None):
        model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        output = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert found.text == answers[0] != answers[1]
