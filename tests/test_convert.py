"""`python -m peft_hificl convert`: the authors' checkpoints become adapters, or are refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface

import peft_hificl.__main__ as command_line
from peft_hificl import Scoring, VirtualPairs, virtual_attention
from peft_hificl.convert import convert

from .helpers import adapted, build, hificl_layers, inputs_for, logits, pairs_for

L, H, N, R, D = 2, 4, 3, 2, 16  # of the models "gqa" and "mha"


def encoder(whole: str = "", seed: int = 0, heads: int = H, dim: int = D) -> dict[str, Tensor]:
    """A checkpoint; `whole` names what is not factorised."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for kind in "KV":
        if kind in whole:
            shapes[f"{kind}_learn"] = (L, heads, N, dim)
        else:
            shapes |= {f"{kind}_learn_A": (L, heads, N, R), f"{kind}_learn_B": (L, heads, R, dim)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A folder with nothing but a configuration."""
    build("gqa").config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def command(file: Path, base: str, output: Path, *more: str) -> list[str]:
    return ["convert", str(file), "--base", base, "--output", str(output), *more]


def product(tensors: dict[str, Tensor], kind: str, layer: int) -> Tensor:
    if f"{kind}_learn" in tensors:
        return tensors[f"{kind}_learn"][layer]
    return tensors[f"{kind}_learn_A"][layer] @ tensors[f"{kind}_learn_B"][layer]


@pytest.mark.parametrize("alpha_one", [False, True], ids=["", "alpha-1"])
@pytest.mark.parametrize("whole", ["", "K", "V", "KV"])
def test_every_variant_loads_with_its_pairs(whole: str, alpha_one: bool, base: str, tmp_path: Path) -> None:
    tensors = encoder(whole)
    torch.save(tensors, tmp_path / "encoder.pth")
    options = ["--no-scale-self-attention"] if alpha_one else []
    command_line.main(command(tmp_path / "encoder.pth", base, tmp_path / "adapter", *options))
    model = PeftModel.from_pretrained(build("gqa"), tmp_path / "adapter")
    layers = hificl_layers(model)
    assert len(layers) == L
    for index, layer in enumerate(layers):
        keys, values, log_weights, scaled, skips = pairs_for(layer)
        torch.testing.assert_close(keys[0], product(tensors, "K", index))
        torch.testing.assert_close(values[0], product(tensors, "V", index))
        assert log_weights is None and scaled is not alpha_one and not skips
    assert not torch.equal(logits(model, **inputs_for("gqa")), logits(build("gqa"), **inputs_for("gqa")))
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["task_type"]) == (base, "CAUSAL_LM")


def test_a_vision_language_model(tmp_path: Path) -> None:
    build("vlm").config.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["LlavaForConditionalGeneration"]  # as save_pretrained of a model writes it
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tensors = encoder(dim=8)
    torch.save(tensors, tmp_path / "encoder.pth")
    convert(tmp_path / "encoder.pth", str(tmp_path / "base"), tmp_path / "adapter")
    model = PeftModel.from_pretrained(build("vlm"), tmp_path / "adapter")
    for index, layer in enumerate(hificl_layers(model)):
        torch.testing.assert_close(pairs_for(layer).keys[0], product(tensors, "K", index))


def test_from_the_shell(base: str, tmp_path: Path) -> None:
    torch.save(encoder(), tmp_path / "encoder.pth")
    python = [sys.executable, "-m", "peft_hificl"]
    done = subprocess.run(
        [*python, *command(tmp_path / "encoder.pth", base, tmp_path / "adapter")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"Saved {tmp_path / 'adapter'}\n"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    failed = subprocess.run(
        [*python, *command(tmp_path / "none.pth", base, tmp_path / "other")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("python -m peft_hificl convert: error: [Errno 2] No such file")


# -- what is refused --------------------------------------------------------------------------------------------------


class NotATensor:
    """Something that only a full unpickling could read."""


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**encoder(), **changes}.items() if value is not None}


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "more-than-tensors": (lambda: changed(K_learn_A=NotATensor()), "is damaged, or holds more than tensors (Unpickl"),
    "no-dict": (lambda: [torch.zeros(3)], "holds list, not a dict of tensors."),
    "missing": (lambda: changed(V_learn_B=None), "lacks ['V_learn_B'] and has unexpected []: the authors' checkpoints"),
    "both-forms": (
        lambda: changed(K_learn=torch.zeros(L, H, N, D)),
        "lacks [] and has unexpected ['K_learn_A', 'K_learn_B']",
    ),
    "other-names": (lambda: {"state": torch.zeros(3), 1: torch.zeros(1)}, "has unexpected ['1', 'state']"),
    "a-number": (lambda: changed(K_learn_A=3), "'K_learn_A' is not a tensor but int"),
    "not-finite": (lambda: changed(V_learn_B=torch.full((L, H, R, D), torch.nan)), "'V_learn_B' holds values that are"),
    "integers": (
        lambda: changed(K_learn_A=torch.ones(L, H, N, R, dtype=torch.int64)),
        "dtype torch.int64, but must be",
    ),
    "dimensions": (lambda: changed(K_learn_A=torch.ones(H, N, R)), "'K_learn_A' of "),
    "heads": (
        lambda: encoder(heads=8),
        "'K_learn_A' of '{file}' has shape (2, 8, 3, 2), but for '{base}' it must be (2, 4, 3, 2): give the base model",
    ),
    "head-dim": (lambda: encoder(dim=8), "'K_learn_B' of '{file}' has shape (2, 4, 2, 8), but for '{base}' it must be"),
    "layers": (
        lambda: {key: tensor.repeat(2, 1, 1, 1) for key, tensor in encoder().items()},
        "has shape (4, 4, 3, 2), but for '{base}' it must be (2, 4, 3, 2)",
    ),
    "other-n": (
        lambda: changed(V_learn_A=torch.ones(L, H, N + 1, R)),
        "'V_learn_A' of '{file}' has shape (2, 4, 4, 2)",
    ),
    "other-r": (lambda: changed(V_learn_A=torch.ones(L, H, N, 5)), "'V_learn_A' of '{file}' has shape (2, 4, 3, 5)"),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    usage, line = capsys.readouterr().err.split("\npython -m peft_hificl convert: error: ")
    assert usage.startswith("usage: python -m peft_hificl convert") and line.count("\n") == 1
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files(case: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[case]
    file = tmp_path / "encoder.pth"
    torch.save(make(), file)
    assert message.format(file=file, base=base) in refused(command(file, base, tmp_path / "adapter"), capsys)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"hello\n", b"PK\x03\x04 half"])
def test_damaged_files(content: bytes, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "encoder.pth"
    file.write_bytes(content)
    line = refused(command(file, base, tmp_path / "adapter"), capsys)
    assert f"{str(file)!r} is damaged, or holds more than tensors" in line


def test_a_folder_that_is_not_empty(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(encoder(), tmp_path / "encoder.pth")
    assert "is not empty: give" in refused(command(tmp_path / "encoder.pth", base, tmp_path), capsys)


def test_a_base_model_that_was_saved_without_its_head(base: str, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    torch.save(encoder(), tmp_path / "encoder.pth")
    convert(tmp_path / "encoder.pth", base, tmp_path / "adapter")
    model = PeftModel.from_pretrained(build("gqa"), tmp_path / "adapter")
    torch.testing.assert_close(pairs_for(hificl_layers(model)[0]).keys[0], product(encoder(), "K", 0))


def test_a_base_model_without_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(encoder(), tmp_path / "encoder.pth")
    (tmp_path / "base").mkdir()
    refused(command(tmp_path / "encoder.pth", str(tmp_path / "base"), tmp_path / "adapter"), capsys)
    assert not (tmp_path / "adapter").exists()


# -- how the authors' training differs --------------------------------------------------------------------------------


def unmasked(query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scaling: float) -> Tensor:
    """Causal attention with pairs whose Z_SA sums over all keys, later ones too."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores, virtual = scaling * query @ key.mT, scaling * query @ pairs.keys.mT
    past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    attended = scores.masked_fill(~past, -torch.inf).softmax(-1) @ value
    total = torch.cat([scores, virtual], dim=-1).exp().sum(-1, keepdim=True)
    return scores.exp().sum(-1, keepdim=True) / total * attended + virtual.exp() / total @ pairs.values


@contextmanager
def authors_training() -> Iterator[None]:
    """Adapted attentions compute `unmasked`."""
    mapping = AttentionInterface._global_mapping
    original = mapping["hificl"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        pairs = module.virtual_pairs(query, key, value)
        return unmasked(query, key, value, pairs, options["scaling"]).transpose(1, 2), None

    mapping["hificl"] = attend
    try:
        yield
    finally:
        mapping["hificl"] = original


@torch.no_grad()
def one_by_one(model: PeftModel, ids: Tensor) -> Tensor:
    """Logits of tokens that are decoded: each sees a cache of those before, and nothing after."""
    found, cache = [], None
    for token in ids.split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        found.append(output.logits)
        cache = output.past_key_values
    return torch.cat(found, dim=1)


def test_their_decoding_agrees_and_their_training_does_not() -> None:
    model, ids = adapted("gqa"), inputs_for("gqa")["input_ids"]
    ours = logits(model, input_ids=ids)
    with authors_training():
        torch.testing.assert_close(one_by_one(model, ids), ours, rtol=1e-4, atol=1e-4)
        theirs = logits(model, input_ids=ids)
        later = ids.clone()
        later[:, -1] = 7
        assert not torch.equal(logits(model, input_ids=later)[:, :-1], theirs[:, :-1])  # a token sees later ones
    change = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)  # (B, T)
    assert change[:, 0].min() > 0.05


def test_only_the_last_token_has_the_same_share() -> None:
    query, key, value = torch.randn(3, 1, H, 8, D)
    pairs = VirtualPairs(torch.randn(1, H, N, D), torch.randn(1, H, N, D))
    ours = virtual_attention(query, key, value, pairs, Scoring(scaling=0.25, is_causal=True))[0]
    theirs = unmasked(query, key, value, pairs, 0.25)
    torch.testing.assert_close(theirs[:, :, -1], ours[:, :, -1])
    assert all((theirs - ours).abs().amax((0, 1, 3))[:-1] > 1e-3)
