"""Exports, traces and compilers of others: the values of the model, and no kernel whose log-sum-exp gets lost.

Values are compared with the definition (`oracle`) or with the model under ``attn_implementation="eager"``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers as tf
from functorch.compile import make_boxed_func
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    convert_and_export_with_cache,
)

from peft_hificl import Scoring, VirtualPairs
from peft_hificl.ops import calls, merged

from . import architectures, oracle
from .helpers import GROUPS, config, tensors

VOCAB = 99
SLOW = pytest.mark.slow
HEADS = {"mha": (4, 4), "gqa": (4, 2), "many": (32, 32), "many-gqa": (32, 8)}


def adapted(heads: str = "gqa", names: tuple[str, ...] = ("default",), **kwargs: Any) -> PeftModel:
    """A small decoder whose adapters have an effect."""
    torch.manual_seed(0)
    count, groups = HEADS[heads]
    base = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8 * count, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=count, num_key_value_heads=groups, initializer_range=0.2, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = get_peft_model(tf.LlamaForCausalLM(base), config(**kwargs), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**kwargs))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hificl_" in name:
                parameter.normal_(std=0.5)
    return model.eval()


class Logits(nn.Module):
    """The model as a function of tensors."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model: tf.PreTrainedModel = model.get_base_model()

    def forward(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


class Step(nn.Module):
    """The same with a cache: ``past`` has keys and values of every layer."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model.get_base_model()

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=tf.DynamicCache(past)
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def prompt(rows: int = 2, length: int = 9, past: int = 0, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of the last ``length`` tokens; row b has 2 b columns of padding on its left."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows + length))
    mask = torch.ones(rows, past + length, dtype=torch.long)
    for row in range(rows if padded else 0):
        mask[row, : 2 * row] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)[:, -length:]


def with_past(rows: int, length: int, past: int, groups: int, padded: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(past)
    cache = [tuple(torch.randn(2, rows, groups, past, 8, generator=generator))]
    return *prompt(rows, length, past, padded), cache


def flat(values: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(values)


def want(module: nn.Module, *args: Any) -> Any:
    """What the eager attention gives."""
    module.model.set_attn_implementation("eager")
    with torch.no_grad():
        result = module(*args)
    module.model.set_attn_implementation("sdpa")
    return result


def operators(graph: torch.fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes if node.op == "call_function")


def to_onnx(module: nn.Module, args: tuple[Any, ...], folder: Path, **kwargs: Any) -> Callable[..., list[Tensor]]:
    """A model in onnxruntime."""
    path = folder / "model.onnx"
    torch.onnx.export(module, args, path, verbose=False, **kwargs)
    session = onnxruntime.InferenceSession(path)

    def run(*args: Any) -> list[Tensor]:
        names = [given.name for given in session.get_inputs()]
        leaves = [leaf.numpy() for leaf in flat(args)]
        return [torch.from_numpy(out) for out in session.run(None, dict(zip(names, leaves, strict=True)))]

    return run


def check(got: Tensor, expected: Tensor, mask: Tensor | None = None, atol: float = 1e-4) -> None:
    """Equal where the mask shows a token."""
    if mask is not None:
        visible = mask[:, -expected.shape[1] :].bool()
        got, expected = got[visible], expected[visible]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol)


# -- the attention alone ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return merged.attention(query, key, value, VirtualPairs(keys, values), Scoring(0.3, is_causal=True))


def others_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A compiler as users write them: torch's own decompositions to core ATen."""
    run = lambda graph, inputs: make_boxed_func(graph.forward)
    return aot_autograd(fw_compiler=run, bw_compiler=run, decompositions=core_aten_decompositions())(graph, inputs)


def exported(module: nn.Module, args: tuple[Tensor, ...], **kwargs: Any) -> Callable[..., Tensor]:
    program = torch.export.export(module, args, **kwargs)
    assert "flash" not in operators(program.graph)
    return program.module()


def lowered(module: nn.Module, args: tuple[Tensor, ...], **kwargs: Any) -> Callable[..., Tensor]:
    return torch.export.export(module, args, **kwargs).run_decompositions().module()


def traced(module: nn.Module, args: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    script = torch.jit.freeze(torch.jit.trace(module.eval(), args, check_trace=False))
    assert "flash" not in str(script.inlined_graph)
    return script


def proxied(module: nn.Module, args: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return make_fx(module, decomposition_table=core_aten_decompositions())(*args)


def compiled(module: nn.Module, args: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, backend=others_backend, fullgraph=True)


WAYS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "export": exported,
    "strict": lambda module, args: exported(module, args, strict=True),
    "core-aten": lowered,
    "jit": traced,
    "make_fx": proxied,
    "others-backend": compiled,
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_definition(way: str, groups: str) -> None:
    torch.manual_seed(0)
    x = tensors(*GROUPS[groups], 5, 5, 8, 8, 5)  # as many pairs as keys: attention weights fit in an LSE's place
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected, _ = oracle.hificl(**x, scaling=0.3, mask=visible)
    with torch.no_grad():
        got = WAYS[way](Attention(), tuple(x.values()))(*x.values())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_one_head_one_token_one_pair() -> None:
    """Even there, where attention weights have as many elements as an LSE."""
    x = {name: tensor.bfloat16() for name, tensor in tensors(1, 1, 1, 1, 8, 8, 1).items()}
    x = {name: tensor[:1] for name, tensor in x.items()}
    with torch.no_grad():
        got = compiled(Attention(), tuple(x.values()))(*x.values())
    expected, _ = oracle.hificl(**{name: tensor.double() for name, tensor in x.items()}, scaling=0.3)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


def test_gradients_under_a_backend_of_others() -> None:
    torch.manual_seed(0)
    x = {name: tensor.requires_grad_() for name, tensor in tensors(4, 2, 5, 5, 8, 8, 5).items()}
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected, _ = oracle.hificl(**x, scaling=0.3, mask=visible)
    got = compiled(Attention(), ())(*x.values())
    direction = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, list(x.values()), direction) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition", "inductor", "other", "thread"])
def test_which_compilers_run_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []
    asked = calls._compiles_kernels

    def told() -> bool:
        answers.append(asked())
        return answers[-1]

    monkeypatch.setattr(calls, "_compiles_kernels", torch.compiler.assume_constant_result(told))
    torch._dynamo.reset()
    x = tuple(t.float() for t in tensors(4, 2, 5, 5, 8, 8, 3).values())
    if backend == "thread":  # one thread compiles, which torch keeps as one flag for all; another only runs
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        runner = threading.Thread(target=lambda: Attention()(*x))
        runner.start()
        runner.join()
    elif backend == "inductor":  # traced for, not compiled
        monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, graph, inputs: graph.forward)
        torch.compile(Attention(), mode="max-autotune-no-cudagraphs")(*x)
    else:
        torch.compile(Attention(), backend=others_backend if backend == "other" else backend)(*x)
    assert answers == [backend not in ("other", "thread")]


# -- models ----------------------------------------------------------------------------------------------------------


KINDS: dict[str, tuple[dict[str, Any], Callable[[PeftModel], Any]]] = {
    "trained": ({}, lambda model: None),
    "frozen": ({}, lambda model: model.requires_grad_(False)),
    "two": ({"names": ("a", "b")}, lambda model: model.base_model.set_adapter(["a", "b"])),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "alpha-one": ({"scale_self_attention": False}, lambda model: None),
    "first-token-skipped": ({"skip_first_token": True, "pair_weights": True}, lambda model: None),
    "whole": ({"factorize_keys": False, "factorize_values": False}, lambda model: None),
}


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "sdpa") for kind in KINDS), ("trained", "eager"), ("trained", "flex_attention")],
)
def test_kinds_of_adapters(kind: str, implementation: str) -> None:
    options, change = KINDS[kind]
    model = adapted(**options)
    change(model)
    module, args = Logits(model), prompt(padded=True)
    if implementation == "flex_attention":
        args = args[:1]  # transformers' mask of padding asks for values
    expected, unadapted = want(module, *args), adapted(**options)
    unadapted.base_model.disable_adapter_layers()
    base = want(Logits(unadapted), *args)
    assert torch.allclose(base, expected, atol=1e-5) is (kind == "disabled")
    module.model.set_attn_implementation(implementation)
    check(lowered(module, args)(*args), expected, *args[1:2])


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=SLOW)], ids=["", "strict"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "first-token-skipped"])
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_symbolic_shapes(heads: str, skip: bool, strict: bool) -> None:
    """Named dimensions, of which torch.export wants to prove all that it uses."""
    module, rows, length = Logits(adapted(heads, skip_first_token=skip)), Dim("rows"), Dim("length")
    shapes = ({0: rows, 1: length},) * 3
    run = exported(module, prompt(padded=True), dynamic_shapes=shapes, strict=strict)
    for other in (prompt(3, 7, padded=True), prompt(1, 12)):
        check(run(*other), want(module, *other), other[1])


def test_positions_from_the_mask_are_part_of_an_export() -> None:
    module = Logits(adapted())
    ids, mask, _ = prompt(padded=True)
    for run in (lowered(module, (ids, mask)), traced(module, (ids, mask))):
        got = run(ids, mask)
        check(got, want(module, ids, mask), mask)
        check(got[1:, 2:], want(module, ids[1:, 2:]))  # the padded row alone


def test_decoding_is_lowered() -> None:
    module, free = Step(adapted()), Dim.DYNAMIC
    shapes = ({0: free}, {0: free, 1: free}, {0: free}, [({0: free, 2: free},) * 2])
    run = lowered(module, with_past(2, 1, 9, 2, True), dynamic_shapes=shapes)
    for args in (with_past(3, 1, 12, 2, True), with_past(1, 1, 4, 2, False)):
        for got, expected in zip(flat(run(*args)), flat(want(module, *args)), strict=True):
            check(got, expected)


@pytest.mark.parametrize("heads", ["gqa", *(pytest.param(h, marks=SLOW) for h in ("many", "mha", "many-gqa"))])
def test_onnxruntime(heads: str, tmp_path: Path) -> None:
    module, free = Logits(adapted(heads)), Dim.DYNAMIC
    run = to_onnx(module, prompt(padded=True), tmp_path, dynamic_shapes=({0: free, 1: free},) * 3)
    for args in (prompt(padded=True), prompt(3, 7, padded=True), prompt(1, 12)):
        check(run(*args)[0], want(module, *args), args[1])


@pytest.mark.parametrize("heads", ["many", pytest.param("gqa", marks=SLOW)])
def test_onnxruntime_with_ids_alone(heads: str, tmp_path: Path) -> None:
    """Static shapes; with 32 heads and 32 tokens, zeros of a wrong shape fit in an LSE's place."""
    module = Logits(adapted(heads))
    ids = torch.randint(3, VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    check(to_onnx(module, (ids,), tmp_path)(ids)[0], want(module, ids), atol=1e-3)


@SLOW
@pytest.mark.parametrize("heads", ["gqa", "many-gqa"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_onnxruntime_goes_on_from_a_cache(length: int, heads: str, dynamic: bool, tmp_path: Path) -> None:
    module, groups, free = Step(adapted(heads)), HEADS[heads][1], Dim.DYNAMIC
    new = {0: free} if length == 1 else {0: free, 1: free}
    shapes = (new, {0: free, 1: free}, new, [({0: free, 2: free},) * 2]) if dynamic else None
    args = with_past(2, length, 9, groups, True)
    run = to_onnx(module, args, tmp_path, dynamic_shapes=shapes)
    others = [with_past(3, length, 12, groups, True), with_past(1, length, 4, groups, False)] if dynamic else []
    for other in (args, *others):
        for got, expected in zip(run(*other), flat(want(module, *other)), strict=True):
            check(got, expected)


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    options, change = KINDS[kind]
    model = adapted(**options)
    change(model)
    module, args = Logits(model), prompt(padded=True)
    check(to_onnx(module, args, tmp_path)(*args)[0], want(module, *args), args[1])


@SLOW
def test_the_torchscript_exporter(tmp_path: Path) -> None:
    module, (ids, mask, positions) = Logits(adapted()), prompt(padded=True)
    run = to_onnx(module, (ids, mask, positions), tmp_path, dynamo=False)
    check(run(ids, mask, positions)[0], want(module, ids, mask, positions), mask)


def to_package(module: nn.Module, args: tuple[Any, ...], folder: Path, **kwargs: Any) -> Callable[..., list[Tensor]]:
    """A model compiled ahead of time."""
    program = torch.export.export(module, args, **kwargs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    return lambda *args: [run(*args)]


@SLOW
@pytest.mark.parametrize("to", [to_onnx, to_package])
def test_what_runs_elsewhere_generates_as_the_model_does(to: Callable[..., Any], tmp_path: Path) -> None:
    """A graph in onnxruntime, and a package compiled ahead of time."""
    module, args, free = Logits(adapted()), prompt(padded=True), Dim.DYNAMIC
    run = to(module, args, tmp_path, dynamic_shapes=({0: free, 1: free},) * 3)
    for other in (args, prompt(3, 7, padded=True)):
        check(run(*other)[0], want(module, *other), other[1])
    ids, mask, _ = prompt(2, 7, padded=True)
    expected = module.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    while ids.shape[1] < expected.shape[1]:
        logits = run(ids, mask, (mask.cumsum(1) - 1).clamp_min(0))[0]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(ids, expected)


# -- transformers' own exporters -------------------------------------------------------------------------------------


def decoded(program: torch.export.ExportedProgram, ids: Tensor) -> Tensor:
    """The logits of one row, token by token through a static cache."""
    step = program.run_decompositions().module()
    positions = [torch.tensor([place]) for place in range(ids.shape[1])]
    return torch.cat([step(input_ids=ids[:, p], cache_position=p) for p in positions], dim=1)


@SLOW
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recipes_for_executorch(implementation: str) -> None:
    model = adapted().get_base_model()
    model.set_attn_implementation(implementation)
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 16}
    ids = prompt(1, 6)[0]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    program = convert_and_export_with_cache(model)
    assert "flash" not in operators(program.graph)
    check(decoded(program, ids), expected)
    step, tokens = program.module(), ids
    for place in range(9):
        new = step(input_ids=tokens[:, place : place + 1], cache_position=torch.tensor([place]))[:, -1:].argmax(-1)
        tokens = tokens if place < 5 else torch.cat([tokens, new], dim=1)
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(tokens, greedy)
    recipe = TorchExportableModuleForDecoderOnlyLM(model)
    check(decoded(recipe.export(input_ids=ids[:, :1], cache_position=torch.tensor([0])), ids), expected)


EXPORTERS = {
    "dynamo": (DynamoExporter, DynamoConfig, {}),
    "strict": (DynamoExporter, DynamoConfig, {"strict": True}),
    "onnx": (OnnxExporter, OnnxConfig, {}),
    "fused": (OnnxExporter, OnnxConfig, {"ort_fusions": "cpu"}),
}


@pytest.mark.parametrize("scale", [True, False], ids=["", "alpha-one"])
@pytest.mark.parametrize("name", ["dynamo", *(pytest.param(n, marks=SLOW) for n in ("strict", "onnx", "fused"))])
def test_transformers_exporters(name: str, scale: bool) -> None:
    exporter, configuration, options = EXPORTERS[name]
    module = Logits(adapted(scale_self_attention=scale))

    def named(args: Iterable[Tensor]) -> dict[str, Any]:
        return dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=True))

    inputs = {**named(prompt(padded=True)), "use_cache": False}
    run = exporter().export(module.model, inputs, configuration(dynamic=True, **options))
    for args in (prompt(padded=True), prompt(3, 7, padded=True)):
        check(run(**named(args)).logits, want(module, *args), args[1])


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_forward_that_exporters_exchange_is_refused(strict: bool) -> None:
    """transformers' exporters put a forward without the attention interface into some vision attentions."""
    family = next(family for family in architectures.FAMILIES if family.name == "qwen2_vl")
    base = architectures.build(family)
    inputs = architectures.forward_inputs(family, base)
    pixels = {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
    model = get_peft_model(base, config(target_modules=r".*visual\.blocks\.\d+\.attn")).eval().get_base_model()
    with pytest.raises(Exception, match="blocks.0.attn.*exclude_modules" if not strict else ""):
        DynamoExporter().export(model.model.visual, pixels, DynamoConfig(strict=strict))
    with torch.no_grad():
        model.model.visual(**pixels)  # as before
