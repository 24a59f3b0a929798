"""SmolLM2-135M-Instruct as a plain model in float32, made once from the quantized weights of a package."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from . import sources

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def convert(packages: Path, folder: Path) -> None:
    """Write weights and tokenizer of the downloaded model into a folder, all of it or nothing.

    A model that is loaded from GGUF counts as quantized: it refuses `Trainer` and `save_pretrained`, though its weights
    are ordinary tensors.  So they are copied into a model without that mark.

    Raises:
        ValueError: the weights are not those that the results are of.
    """
    ((_, content),) = sources.read(packages, sources.MODEL, ending=GGUF).items()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{GGUF} has the digest {found}, not {SHA256}: remove {packages} and prepare anew.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        Path(temporary, GGUF).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=GGUF)
        quantized = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=GGUF, dtype=torch.float32)
        config = quantized.config.to_dict()
        config.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(quantized.state_dict())
        model.tie_weights()
        whole = Path(temporary, "model")
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        os.replace(whole, folder)


def load_base(folder: Path, device: str | None = None) -> LlamaForCausalLM:
    """The model, on the GPU if there is one and no other device is asked for.

    Raises:
        FileNotFoundError: it has not been prepared.
    """
    model = LlamaForCausalLM.from_pretrained(_there(folder), dtype=torch.float32).eval()
    model.config.use_cache = False
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_tokenizer(folder: Path) -> Any:
    """Its tokenizer.

    Raises:
        FileNotFoundError: it has not been prepared.
    """
    return AutoTokenizer.from_pretrained(_there(folder))


def _there(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"There is no model in {folder}: run `python -m benchmarks.real_base prepare`.")
    return folder
