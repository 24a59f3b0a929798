"""CUDA's kernels without CUDA: stand-ins of the same signatures (`cuda_kernels`) take their place on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_hificl import Scoring, VirtualPairs
from peft_hificl.ops import kernels, merged
from peft_hificl.ops.kernels import KERNELS, Call

from . import oracle
from .cuda_kernels import NAMES, Aten, take_the_place_of_the_cpus
from .helpers import GROUPS, mask_of, tensors

DEVICE = torch.device("cuda", 3)


@pytest.fixture(params=NAMES)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of CUDA's kernels, in the place of the CPU's."""
    take_the_place_of_the_cpus(monkeypatch, request.param)
    return request.param


def check(inputs: dict[str, Tensor], log_weights: Tensor | None = None, **options: object) -> None:
    """Forward and every gradient against the definition."""
    given = dict(options)
    if given.pop("is_causal", False):
        given["mask"] = mask_of("causal", inputs["query"].shape[2], inputs["key"].shape[2], 1)
    want_in, x = ({k: v.clone().requires_grad_() for k, v in inputs.items()} for _ in range(2))
    want, _ = oracle.hificl(**want_in, scaling=0.3, log_weights=log_weights, **given)
    pairs = VirtualPairs(x["virtual_keys"], x["virtual_values"], log_weights)
    args = (x["query"], x["key"], x["value"], pairs)
    got = merged.attention(*args, Scoring(0.3, **options))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    direction = torch.randn_like(want)
    grads_want = torch.autograd.grad(want, list(want_in.values()), direction)
    for a, b in zip(torch.autograd.grad(got, list(x.values()), direction), grads_want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(merged.attention(*args, Scoring(0.3, **options)), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["plain", "is_causal", "decode", "more-keys"])
@pytest.mark.parametrize("groups", GROUPS)
def test_without_a_mask(groups: str, case: str, kernel: str) -> None:
    torch.manual_seed(0)
    heads, kv = GROUPS[groups]
    length, size = {"decode": (1, 9), "more-keys": (3, 7)}.get(case, (5, 5))
    check(tensors(heads, kv, length, size, 6, 6, 3), **({"is_causal": True} if case == "is_causal" else {}))


@pytest.mark.parametrize("size", [5, 16, 18], ids=str)
@pytest.mark.parametrize("mask", ["causal", "per-head", "transposed", "one-for-all-keys", "log-weights", "decode"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kernel", ["efficient", "cudnn"], indirect=True)
def test_masks(kernel: str, groups: str, mask: str, size: int) -> None:
    torch.manual_seed(1)
    heads, kv = GROUPS[groups]
    length = 1 if mask == "decode" else 3
    given: dict[str, object] = {
        "causal": lambda: {"mask": mask_of("causal", length, size, heads)},
        "per-head": lambda: {"mask": mask_of("per-head", length, size, heads)},
        "decode": lambda: {"mask": mask_of("per-head", length, size, heads)},
        "transposed": lambda: {"mask": torch.randn(2, 1, size, length, dtype=torch.float64).mT},
        "one-for-all-keys": lambda: {"mask": torch.randn(2, heads, length, 1, dtype=torch.float64)},
        "log-weights": lambda: {"log_weights": torch.randn(2, heads, 3, dtype=torch.float64)},
    }[mask]()
    check(tensors(heads, kv, length, size, 6, 6, 3), **given)


def call(dim: int = 64, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Call:
    q = torch.empty(1, 4, 6, dim, dtype=dtype, device="meta")
    return Call(q, q, q, None, True, 0.3)._replace(**changes)


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: str) -> Callable[[Call], str | None]:
    monkeypatch.setattr(kernels, "_capability", lambda device: capability)
    return KERNELS["cuda"][kernel].limits


def test_limits_of_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = on(monkeypatch, (8, 0), "flash")
    few = torch.empty(1, 4, 3, 64, dtype=torch.bfloat16, device="meta")
    assert limits(call()) is None and limits(call(dtype=torch.float16)) is None
    assert limits(call(key=few, is_causal=False)) is None and "square" in limits(call(key=few))
    assert "takes no mask" in limits(call(mask=few))
    for dtype in (torch.float32, torch.float64):
        assert "float16 or bfloat16" in limits(call(dtype=dtype))
    for dim, fits in ((8, True), (4, False), (192, True), (200, True), (252, False), (256, True), (264, False)):
        assert (limits(call(dim)) is None) == fits, dim
    assert all("up to 256 that is a multiple of 8" in limits(call(dim)) for dim in (4, 252, 264))
    for capability, wide in (((8, 0), True), ((8, 6), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)):
        limits = on(monkeypatch, capability, "flash")
        assert limits(call(192)) is None
        assert limits(call(200)) is None if wide else "no backward for this head dimension" in limits(call(200))
    assert "capability 8.0" in on(monkeypatch, (7, 5), "flash")(call())
    monkeypatch.setattr(torch._C, "_get_flash_sdp_enabled", lambda: False)
    assert "switched off" in on(monkeypatch, (8, 0), "flash")(call())


def test_limits_of_memory_efficient(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = on(monkeypatch, (8, 0), "efficient")
    few = torch.empty(1, 4, 3, 64, dtype=torch.bfloat16, device="meta")
    assert limits(call()) is None and limits(call(key=few, mask=few)) is None
    assert limits(call(4, torch.float32)) is None and limits(call(8, torch.float16)) is None
    assert "16 bytes" in limits(call(4)) and "16 bytes" in limits(call(6, torch.float32))
    assert "float64" in limits(call(dtype=torch.float64))
    limits = on(monkeypatch, (7, 5), "efficient")
    assert "bfloat16 on this device" in limits(call()) and limits(call(dtype=torch.float16)) is None
    monkeypatch.setattr(torch._C, "_get_mem_efficient_sdp_enabled", lambda: False)
    assert "switched off" in on(monkeypatch, (8, 0), "efficient")(call())


def test_the_limits_ask_the_device_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {DEVICE: (7, 5), torch.device("meta"): (8, 0)}.get)
    assert kernels._capability(DEVICE) == (7, 5)
    assert KERNELS["cuda"]["flash"].limits(call()) is None
    assert KERNELS["cuda"]["efficient"].limits(call()) is None


def test_limits_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_prefers_cudnn", lambda device: True)
    limits = KERNELS["cuda"]["cudnn"].limits

    def square(length: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Call:
        q = torch.empty(1, 4, length, dim, dtype=dtype, device="meta")
        return Call(q, q, q, None, True, 0.3)._replace(**changes)

    whole = square(80)
    assert limits(whole) is None and limits(square(64, 128, torch.float16, mask=whole.query)) is None
    for dtype in (torch.float32, torch.float64):
        assert limits(square(80, dtype=dtype)) == "cuDNN's attention wants float16 or bfloat16"
    for dim, fits in ((8, True), (4, False), (128, True), (136, False)):
        assert (limits(square(80, dim)) is None) == fits, dim
    assert limits(square(80, 136)) == "cuDNN's attention wants a head dimension up to 128 that is a multiple of 8"
    more = square(96).query
    assert limits(square(80, key=more)) == "cuDNN's attention wants causal attention to be square"
    assert limits(square(80, key=more, is_causal=False)) is None
    small = "cuDNN's attention is not worth its plan for one query or for fewer than 64 keys"
    assert limits(square(63)) == limits(square(1, key=more, is_causal=False)) == small
    with monkeypatch.context() as within:
        within.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert limits(whole) == "cuDNN's attention is not deterministic"
    with monkeypatch.context() as within:
        within.setattr(torch._C, "_get_cudnn_sdp_enabled", lambda: False)
        assert limits(whole) == "cuDNN's attention is switched off"
    monkeypatch.setattr(kernels, "_prefers_cudnn", lambda device: False)
    assert limits(whole) == "cuDNN's attention is not what PyTorch prefers on this device"


@pytest.mark.parametrize(
    ("capability", "version", "preferred"),
    [
        ((9, 0), 91900, True), ((9, 0), 91500, False), ((9, 0), None, False), ((8, 0), 91900, False),
        ((10, 0), 91501, True), ((10, 3), 91900, True), ((10, 7), 91900, False), ((12, 0), 91900, False),
    ],
)  # fmt: skip
def test_cudnn_is_taken_where_pytorch_prefers_it(
    capability: tuple[int, int], version: int | None, preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert kernels._prefers_cudnn(DEVICE) is preferred


def test_the_order_of_the_kernels() -> None:
    assert list(KERNELS["cuda"]) == ["cudnn", "flash", "efficient"]
    assert [kernel.groups for kernel in KERNELS["cuda"].values()] == [True, True, False]


def test_reasons_are_whole_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `attention_path` and the log give them."""
    few, asked = torch.empty(1, 4, 3, 64, dtype=torch.bfloat16, device="meta"), {(8, 6): [], (7, 5): []}
    for capability, reasons in asked.items():
        flash, efficient = (on(monkeypatch, capability, name) for name in ("flash", "efficient"))
        reasons += [flash(call()), efficient(call())]
    flash, efficient = (on(monkeypatch, (8, 6), name) for name in ("flash", "efficient"))
    found = [
        flash(call(mask=few)),
        flash(call(4)),
        flash(call(200)),
        flash(call(key=few)),
        flash(call(64, torch.float32)),
    ]
    assert asked[8, 6] == [None, None]
    assert asked[7, 5] == [
        "flash attention wants a device of capability 8.0",
        "memory-efficient attention has no bfloat16 on this device",
    ]
    assert found == [
        "flash attention takes no mask",
        "flash attention wants a head dimension up to 256 that is a multiple of 8",
        "flash attention has no backward for this head dimension on this device",
        "flash attention wants causal attention to be square",
        "flash attention wants float16 or bfloat16",
    ]
    assert efficient(call(64, torch.float64)) == "memory-efficient attention does not take float64"
    assert efficient(call(4)) == "memory-efficient attention wants rows of a multiple of 16 bytes"
    for name in ("flash", "mem_efficient"):
        monkeypatch.setattr(torch._C, f"_get_{name}_sdp_enabled", lambda: False)
    assert flash(call()) == KERNELS["cpu"]["flash"].limits(call()) == "flash attention is switched off"
    assert efficient(call()) == "memory-efficient attention is switched off"


def test_nothing_is_copied_that_the_memory_efficient_kernel_can_read() -> None:
    query, key, value = (torch.randn(2, 4, length, 8) for length in (3, 32, 32))
    for mask in (torch.randn(2, 4, 3, 32), torch.randn(3, 32), torch.randn(1, 1, 3, 48)[..., :32]):
        laid_out = kernels._layout(Call(query, key, value, mask, False, 0.3))
        assert laid_out[0] is query and laid_out[1] is key and laid_out[2] is value
        assert laid_out[3].data_ptr() == mask.data_ptr() and torch.equal(laid_out[3], mask.expand(2, 4, 3, 32))


def test_a_devices_capability_is_a_constant_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def untraceable(device: torch.device) -> tuple[int, int]:
        torch._dynamo.graph_break()
        return (7, 5)

    monkeypatch.setattr(torch.cuda, "get_device_capability", untraceable)
    torch._dynamo.reset()
    wanted = torch.compile(lambda x: x + kernels._capability(x.device)[1], backend="eager", fullgraph=True)
    assert torch.equal(wanted(torch.zeros(2)), torch.full((2,), 5.0))


@pytest.mark.parametrize("groups", GROUPS)
def test_an_lse_as_long_as_the_head_dimension(groups: str, kernel: str) -> None:
    """The memory-efficient kernel pads it to 32, for whatever number of queries."""
    torch.manual_seed(2)
    heads, kv = GROUPS[groups]
    check(tensors(heads, kv, 3, 7, 32, 32, 3))


@pytest.mark.parametrize("alpha_one", [False, True], ids=["", "alpha-1"])
@pytest.mark.parametrize("layout", ["heads-first", "tokens-first", "of-a-larger-one"])
def test_a_backward_gets_what_its_forward_laid_out(kernel: str, layout: str, alpha_one: bool) -> None:
    """The output and its gradient, whatever the layout of the query and of the gradient that comes in."""
    torch.manual_seed(3)
    x = tensors(4, 2, 3, 7, 8, 8, 3)
    x["sinks"] = torch.randn(4, dtype=torch.float64)
    want_in = {name: t.clone().requires_grad_() for name, t in x.items()}
    want, _ = oracle.hificl(**want_in, scaling=0.3, alpha_one=alpha_one)

    def laid_out(t: Tensor) -> Tensor:
        if layout == "tokens-first":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.cat([t, t], dim=2)[:, :, : t.shape[2]] if layout == "of-a-larger-one" else t.contiguous()

    y = {name: (laid_out(t) if t.dim() == 4 else t.clone()).detach().requires_grad_() for name, t in x.items()}
    pairs = VirtualPairs(y["virtual_keys"], y["virtual_values"], None, not alpha_one)
    got = merged.attention(y["query"], y["key"], y["value"], pairs, Scoring(0.3, sinks=y["sinks"]))
    direction = torch.randn_like(want)
    grads_want = torch.autograd.grad(want, list(want_in.values()), direction)
    for a, b in zip(torch.autograd.grad(got, list(y.values()), laid_out(direction)), grads_want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_lse_may_have_any_layout(kernel: str) -> None:
    """It comes from wherever the context was computed; 32 queries need no padding."""
    torch.manual_seed(3)
    query, grad, output = torch.randn(3, 2, 4, 32, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 6, 8, dtype=torch.float64)
    own = KERNELS["cpu"][kernel]
    call = Call(query, key, value, None, False, 0.3)
    _, lse, state = own.forward(call)
    laid_out = lse.transpose(0, 1).contiguous().transpose(0, 1)
    assert not laid_out.is_contiguous()
    for a, b in zip(*(own.backward(call, grad, output, of, state) for of in (lse, laid_out)), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernels in the place of the CPU's, flash first, which takes no mask."""
    monkeypatch.setattr(kernels, "aten", Aten())
    flash, efficient = (KERNELS["cuda"][name] for name in ("flash", "efficient"))
    limits = {"flash": lambda call: "no mask" if call.mask is not None else None, "efficient": lambda call: None}
    here = {n: k._replace(limits=limits[n]) for n, k in (("flash", flash), ("efficient", efficient))}
    monkeypatch.setitem(KERNELS, "cpu", here)


@pytest.mark.parametrize("alpha_one", [False, True], ids=["", "alpha-1"])
@pytest.mark.parametrize("masked", ["context", "pairs", "both", "neither"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("groups", GROUPS)
def test_each_call_takes_the_first_kernel_that_can(
    groups: str, length: int, masked: str, alpha_one: bool, both: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-weights, sinks and alpha = 1 included: values and gradients."""
    torch.manual_seed(4)
    taken: list[str] = []
    for name, kernel in KERNELS["cpu"].items():

        def counted(call: Call, name: str = name, forward: Callable[..., object] = kernel.forward) -> object:
            taken.append(name)
            return forward(call)

        monkeypatch.setitem(KERNELS["cpu"], name, kernel._replace(forward=counted))
    heads, kv = GROUPS[groups]
    x = tensors(heads, kv, length, 5, 6, 6, 3)
    x["sinks"] = torch.randn(heads, dtype=torch.float64)
    if masked in ("pairs", "both"):
        x["log_weights"] = torch.randn(1, heads, 3, dtype=torch.float64)
    mask = mask_of("causal", length, 5, heads) if masked in ("context", "both") else None
    want_in, y = ({k: v.clone().requires_grad_() for k, v in x.items()} for _ in range(2))
    want, _ = oracle.hificl(**want_in, scaling=0.3, mask=mask, alpha_one=alpha_one)
    pairs = VirtualPairs(y["virtual_keys"], y["virtual_values"], y.get("log_weights"), not alpha_one)
    args = (y["query"], y["key"], y["value"], pairs, Scoring(0.3, mask=mask, sinks=y["sinks"]))
    got = merged.attention(*args)
    assert taken == [("flash", "efficient")[mask is not None], ("flash", "efficient")["log_weights" in x]]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    direction = torch.randn_like(want)
    grads_want = torch.autograd.grad(want, list(want_in.values()), direction)
    for name, a, b in zip(x, torch.autograd.grad(got, list(y.values()), direction), grads_want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(merged.attention(*args), want, rtol=0, atol=1e-10)
