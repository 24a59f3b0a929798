"""Flash attention packages on a GPU, against the formula in float64 on the CPU; skipped where none is installed.

Nothing is downloaded: kernels from the Hub are run if `FLASH_KERNELS` names them (with commas between them).
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from peft_hificl import HiFICLConfig, Scoring, VirtualPairs, backends, virtual_attention
from peft_hificl.ops import merged
from peft_hificl.ops.packages import Packing, sequences_of_mask, sequences_of_positions

from .flash_packages import SIGNATURES
from .helpers import VOCAB, of_each_query

NAMED = [name for name in os.environ.get("FLASH_KERNELS", "").split(",") if name]
INSTALLED = {
    "flash_attention_2": is_flash_attn_2_available(),
    "flash_attention_3": is_flash_attn_3_available(),
    "flash_attention_4": is_flash_attn_4_available(),
} | dict.fromkeys(NAMED, True)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=pytest.mark.skipif(not installed, reason=f"{name} is not installed"))
        for name, installed in INSTALLED.items()
    ],
)

DEVICE = torch.device("cuda")
# Errors are ||got - want|| / ||want||, in units of the dtype's eps: as in test_gpu.py, with a margin, as most of these
# packages have not been run.
FORWARD, BACKWARD = 1.0, 2.0


def within(name: str, got: Tensor, want: Tensor, units: float, scale: Tensor | None = None) -> None:
    eps = torch.finfo(got.dtype).eps
    got, want = got.detach().double().cpu(), want.detach()
    error = float((got - want).norm() / (want if scale is None else scale).norm().clamp_min(1e-3)) / eps
    assert error <= units, f"{name}: {error:.2f} eps"


def padded(rows: int, size: int) -> Tensor:
    mask = torch.ones(rows, size, dtype=torch.long)
    mask[-1, : size // 3] = 0
    return mask


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("case", ["rows", "decode", "padded", "padded-decode", "documents", "both-ways"])
@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
@pytest.mark.parametrize("heads, kv, dim", [(4, 4, 64), (4, 2, 128), (8, 1, 64)], ids=["mha", "gqa", "mqa"])
def test_values_and_gradients(
    heads: int, kv: int, dim: int, plain: bool, case: str, window: int | None, dtype: torch.dtype, implementation: str
) -> None:
    """With all that pairs and a context can have, and `plain` pairs alone, which another kernel computes."""
    torch.manual_seed(0)
    rows, size = 1 if case == "documents" else 2, 37
    length = 1 if "decode" in case else size
    x = {
        "query": torch.randn(rows, length, heads, dim).transpose(1, 2),
        "key": torch.randn(rows, size, kv, dim).transpose(1, 2),
        "value": torch.randn(rows, size, kv, dim).transpose(1, 2),
        "keys": torch.randn(1, heads, 8, dim),
        "values": torch.randn(1, heads, 8, dim),
    }
    if not plain:
        x |= {"log_weights": torch.randn(1, heads, 8), "sinks": torch.randn(heads)}
    sequences = None
    if "padded" in case:
        sequences = sequences_of_mask(padded(rows, size).to(DEVICE), length)
    elif case == "documents":
        positions = torch.cat([torch.arange(n) for n in (10, 1, 26)])
        sequences = sequences_of_positions(positions.to(DEVICE))
    package = backends.flash_package(implementation, "a test")
    packing = Packing(package, sequences, case != "both-ways", window)
    exact = {name: t.to(dtype).double().requires_grad_() for name, t in x.items()}
    mine = {name: t.to(DEVICE, dtype).requires_grad_() for name, t in x.items()}
    mask = packing.mask(mine["query"], mine["key"]).cpu()
    real = mask.any(-1)  # (B, 1, T)

    def run(attend: Any, x: dict[str, Tensor], mask: Any) -> Any:
        pairs = VirtualPairs(x["keys"], x["values"], x.get("log_weights"), skip_first_token=not plain)
        return attend(x["query"], x["key"], x["value"], pairs, Scoring(dim**-0.5, mask=mask, sinks=x.get("sinks")))

    assert run(merged.attention_path, mine, packing).kernel == package.name
    want = torch.where(real[..., None], run(virtual_attention, exact, mask)[0], 0)
    got = run(merged.attention, mine, packing)
    within("output", got, want, FORWARD)
    direction = torch.randn(want.shape).to(dtype)
    scales = {} if plain else {"sinks": of_each_query(want, exact["sinks"], direction.double())}
    expected = torch.autograd.grad(want, list(exact.values()), direction.double())
    found = torch.autograd.grad(got, list(mine.values()), direction.to(DEVICE))
    for name, a, b in zip(x, found, expected, strict=True):
        within(name, a, b, BACKWARD, scales.get(name))


@implementations
@pytest.mark.parametrize("given", ["padded", "documents"])
def test_a_model(given: str, implementation: str) -> None:
    """As under sdpa: logits, gradients, and generation."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 128)
    llama = tf.LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, **sizes,
    )  # fmt: skip
    base = tf.LlamaForCausalLM(llama).to(DEVICE, torch.bfloat16).eval()
    model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8, init_weights=False))
    ids = torch.randint(5, VOCAB, (1 if given == "documents" else 2, 24), device=DEVICE)
    inputs: dict[str, Any] = {"input_ids": ids}
    real = torch.ones_like(ids)
    if given == "padded":
        inputs["attention_mask"] = real = padded(2, 24).to(DEVICE)
    else:
        inputs["position_ids"] = torch.cat([torch.arange(n, device=DEVICE) for n in (7, 17)])[None]
        inputs["use_cache"] = False  # with a cache, transformers' masks for sdpa do not tell documents apart
    results = []
    for name in ("sdpa", implementation):
        base.set_attn_implementation(name)
        model.zero_grad()
        output = model(**inputs).logits[real.bool()].float()
        output.log_softmax(-1)[..., 7].sum().backward()
        results.append([output.detach()] + [p.grad.float() for p in model.parameters() if p.grad is not None])
    for want, got in zip(*results, strict=True):
        assert float((got - want).norm() / want.norm()) < 0.05
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    assert torch.equal(model.generate(**prompt, **settings), model.generate(**prompt, **settings, use_cache=False))


@implementations
def test_the_parameters_are_those_of_the_stand_ins(implementation: str) -> None:
    """What the CPU tests stand on: whatever those give a name to is called so here."""
    (rows, sequences, *_), *_ = lazy_import_flash_attention(implementation)
    family = {"flash_attention_3": "fa3", "flash_attention_4": "fa4"}.get(implementation, "fa2")
    for name, function in ("flash_attn_func", rows), ("flash_attn_varlen_func", sequences):
        named = [part.partition("=")[0].strip() for part in SIGNATURES[family][name].split(",")]
        wanted = {part for part in named if part.isidentifier()}
        assert wanted <= set(inspect.signature(function).parameters), name
