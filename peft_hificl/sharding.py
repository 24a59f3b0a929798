"""Adapters on a base model that several devices share: tensor, sequence and context parallelism, FSDP2.

transformers' tensor-parallel plans give each rank the query and key/value heads of one contiguous block.  The pairs of
a head are needed where the head is: an adapter's parameters, whose first dimension counts heads, are `DTensor`s with
``Shard(0)`` on the model's "tp" mesh.  Their shapes, state dicts and files are those of one process; `local` gives the
part of this rank where it is computed with.  Attentions that a plan leaves whole on every rank have ``Replicate()``.

Sequence parallelism (DeepSpeed's Ulysses) divides tokens outside of the attention, and heads within it: two all-to-alls
exchange one for the other.  Every rank has the whole adapter, and uses the pairs of its heads for all tokens.

Context parallelism (torch's) divides tokens, and keys and values go round the ranks.  Every rank has the whole adapter,
and merges the pairs into what its own queries get; see `ops.ring`.

Data parallelism has nothing to know of an adapter that is there when it wraps the model.  Later ones are sharded here,
as FSDP2 has sharded their attention, or refused.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.distributed
from torch import Tensor, nn

from .config import HiFICLConfig
from .names import HeadShape, plain
from .ops import merged
from .ops.formula import Scoring, VirtualPairs

if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
else:  # torch can be built without it
    DTensor = FSDPModule = FullyShardedDataParallel = ()  # type: ignore[misc,assignment]  # nothing is an instance of it

# transformers' names for the dimensions of a device mesh: that which divides heads, and FSDP2's.
_AXIS, _DATA = "tp", "fsdp"
# By the style of its output projection in a plan, the styles that the other modules of an attention may have.
_DIVIDED = {"rowwise", "colwise", "packed_colwise", "mla_kv_a_proj", "replicated_with_grad_allreduce"}
_WHOLE = {"rowwise_split_input", "rowwise_rep", "colwise_gather_output", "colwise_rep"}


class Sharding(NamedTuple):
    """Where the parameters of the adapters on one attention are.

    Attributes:
        mesh: the ranks that share the attention; None: it is not divided by tensor parallelism.
        divided: True: each rank has the pairs of its own heads.  False: each rank has all heads, and all pairs.
        data: the ranks that FSDP2 shards parameters over, between forwards; None: it does not.
    """

    mesh: DeviceMesh | None
    divided: bool
    data: DeviceMesh | None

    def part(self, whole: HeadShape) -> HeadShape:
        """The heads that this rank attends with."""
        ranks = self.mesh.size() if self.mesh is not None and self.divided else 1
        return whole._replace(heads=whole.heads // ranks, groups=whole.groups // ranks)

    def place(self, factor: nn.Module) -> None:
        """Leave this rank its part of a `Factor`: of the first rank's values, if the others of the mesh differ."""
        if self.mesh is not None:
            weight: Any = factor.weight
            placement = Shard(0) if self.divided else Replicate()
            source = None if weight.is_meta else 0
            tensor = distribute_tensor(weight.data, self.mesh, [placement], src_data_rank=source)
            # Not by its name: where PEFT creates weights on the meta device, it would create this one again.
            factor._parameters["weight"] = nn.Parameter(tensor, requires_grad=weight.requires_grad)
        if self.data is not None:
            # By itself: in a model that has run, FSDP2 takes no group of several modules.
            fully_shard(factor, mesh=self.data)

    def gathered(self, tensor: Tensor) -> Tensor:
        """A tensor (B, H, ...) of the heads of all ranks, from that of this rank's."""
        return DTensor.from_local(tensor, self.mesh, [Shard(1)]).full_tensor() if self.divided else tensor


def sharding_of(model: nn.Module, name: str, attention: nn.Module, shape: HeadShape) -> Sharding | None:
    """How an attention of a model is divided, by transformers when it loaded it or by FSDP2; None if it is not.

    Raises:
        ValueError: it is divided in a way that HiFICL could get wrong, or its heads do not divide.
    """
    data = _data_mesh(model) or _fsdp_mesh(model, name, attention)
    weights = [p for p in attention.parameters() if isinstance(p, DTensor)]
    weights = [w for w in weights if _AXIS in (w.device_mesh.mesh_dim_names or ())]
    divided = not all(w.placements[-1].is_replicate() for w in weights)
    if (getattr(model, "_tp_size", None) or 1) == 1:
        if divided:
            raise ValueError(
                f"The weights of {name!r} are divided by tensor parallelism, but {type(model).__name__} has no plan of "
                "it: attach the adapter to the whole model that from_pretrained(distributed_config=...) returned."
            )
        return None if data is None else Sharding(None, divided=False, data=data)
    prefix = re.sub(r"\.\d+(?=\.)", ".*", f"{plain(name)}.")
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    styles = {key.removeprefix(prefix): style for key, style in plan.items() if key.startswith(prefix)}
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None or (styles and not divided):
        raise ValueError(
            f"{type(model).__name__} is divided by tensor parallelism, but the weights of {name!r} are no DTensors: "
            "HiFICL needs the plans of transformers 5.17 or later, and weights that are not quantised."
        )
    mesh = mesh[_AXIS] if mesh.ndim > 1 else mesh
    if set(styles.values()) <= _WHOLE and bool(styles) == divided:
        return Sharding(mesh, divided=False, data=data)
    other = {module: style for module, style in styles.items() if style not in _DIVIDED}
    if other or "rowwise" not in styles.values():
        raise ValueError(
            f"The tensor-parallel plan divides the heads of {name!r} in a way that HiFICL does not know: {styles}. "
            "Projections to heads must all be 'colwise' and the output projection 'rowwise' (keys and values that "
            "each rank has whole, beside queries that are divided, get wrong gradients in the base model itself)."
        )
    ranks = mesh.size()
    if shape.heads % ranks or shape.groups % ranks:
        raise ValueError(
            f"{name!r} has {shape.heads} query heads and {shape.groups} key/value heads, which {ranks} ranks of tensor "
            "parallelism cannot share equally: load the model with a tp_size that divides both numbers."
        )
    return Sharding(mesh, divided=True, data=data)


def _data_mesh(model: nn.Module) -> DeviceMesh | None:
    """The ranks over which transformers has sharded a model with FSDP2 when it loaded it; None if it has not."""
    mesh: Any = getattr(model, "_device_mesh", None)
    plan: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    if mesh is None or getattr(plan, "dp_size", 1) == 1:
        return None
    if plan.dp_replicate_size > 1 or plan.fsdp_cpu_offload:
        raise ValueError(
            f"transformers has loaded {type(model).__name__} with dp_replicate_size={plan.dp_replicate_size}, "
            f"fsdp_cpu_offload={plan.fsdp_cpu_offload}, where an adapter that is attached now would have no place: "
            "load the model without them, attach the adapter, and shard both with fully_shard or accelerate."
        )
    found: DeviceMesh = mesh[_DATA]
    return found


def _fsdp_mesh(model: nn.Module, name: str, attention: nn.Module) -> DeviceMesh | None:
    """The ranks over which FSDP2 has sharded an attention of a model that was loaded whole; None if it has not.

    Raises:
        ValueError: it has sharded what is divided by tensor parallelism, too, or keeps it elsewhere.
    """
    places = [model.get_submodule(name[:end]) for end, letter in enumerate(f"{name}.") if letter == "."]
    units = [module for module in (model, *places) if isinstance(module, FSDPModule)]
    if units and not any(isinstance(p, DTensor) or p.is_meta for p in attention.parameters()):  # meta: a dry run
        units[-1].reshard()  # after a forward, its parameters may still be whole
    sharded = [p for p in attention.parameters() if isinstance(p, DTensor)]
    meshes = [p.device_mesh for p in sharded if p.device_mesh.mesh_dim_names != (_AXIS,)]
    if units and not sharded and not any(p.is_meta for p in attention.parameters()):
        raise ValueError(
            f"FSDP2 has sharded {type(model).__name__} without {name!r} (ignored_params), and would not reduce the "
            "gradients of an adapter that is attached there now: attach it before the model is sharded."
        )
    if not meshes:
        return None
    if _AXIS in (meshes[0].mesh_dim_names or ()) or sharded[0].device.type != meshes[0].device_type:
        raise ValueError(
            f"{name!r} is sharded by FSDP2 beside tensor parallelism, or offloaded by it, where an adapter that is "
            "attached now would have no place: attach it before the model is sharded."
        )
    return meshes[0]


def check_late(model: nn.Module, config: HiFICLConfig) -> None:
    """Refuse to attach an adapter for training to a model whose shards are laid out already, which would leave it out.

    FSDP2 can take it (`sharding_of`); FSDP1 and ZeRO-3 would not reduce its gradients, and the ranks diverge.

    Raises:
        ValueError: FSDP1 has wrapped the model, or DeepSpeed has made a ZeRO-3 engine of it.
    """
    if config.inference_mode:
        return
    if any(hasattr(module, "ds_id") for module in model.modules()):
        sharder = "DeepSpeed's ZeRO-3"
    elif any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        sharder = "FSDP (version 1)"
    else:
        return
    raise ValueError(
        f"{sharder} has sharded {type(model).__name__}, and would not reduce the gradients of an adapter that is "
        "attached now: attach it before, or use FSDP2, which takes one afterwards."
    )


def forget(model: nn.Module) -> None:
    """Let a copy of a model, which is whole, know nothing of the ranks that share the model."""
    vars(model).update(_tp_size=None, _device_mesh=None)
    for module in model.modules():
        if isinstance(vars(module).get("sharding"), Sharding):
            vars(module)["sharding"] = None


def check_beside(model: nn.Module, config: HiFICLConfig, heads: tuple[str, ...]) -> None:
    """Refuse copies of modules that are divided: PEFT's copy would compute with the base model's weights, or fail.

    Args:
        model: the base model.
        config: the adapter's configuration.
        heads: ends of the names of modules that PEFT copies for the task of the adapter.

    Raises:
        ValueError: such a module in `modules_to_save`, or tokens of an embedding that is divided.
    """
    tokens = config.trainable_token_indices
    ends = (*(config.modules_to_save or ()), *(tokens if isinstance(tokens, dict) else ()), *heads)
    copied = {name: module for name, module in model.named_modules() if name.endswith(ends)}
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)  # PEFT goes by a name where there is none
    if isinstance(tokens, list | tuple) and (found := embedding()) is not None:
        copied["the input embedding"] = found
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())  # which may be whole at this moment
    for name, module in copied.items():
        if sharded or any(isinstance(p, DTensor) for p in module.parameters()):
            raise ValueError(
                f"Module {name!r} is divided among ranks, and PEFT's copy of it (modules_to_save, "
                "trainable_token_indices) would compute with the base model's weights: leave it out."
            )


def check_whole(model: nn.Module, doing: str) -> None:
    """Raise a ValueError if a rank has the pairs of some heads alone."""
    for name, module in model.named_modules():
        sharding = getattr(module, "sharding", None)
        if isinstance(sharding, Sharding) and (sharding.divided or sharding.data is not None):
            raise ValueError(
                f"{doing} needs the pairs of all heads, but several ranks share those of {name!r}: save the adapter, "
                "and load it onto a model that one process has whole (device_map='auto' spreads its layers)."
            )


def local(weight: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with; any tensor that is not divided by `Sharding` as it is.

    FSDP2's parameters are `DTensor`s, too, but on other meshes, and whole while their module runs.
    """
    if isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names == (_AXIS,):
        part: Tensor = weight.to_local()
        return part
    return weight


def like(value: Tensor, parameter: Tensor, source: int | None = None) -> Tensor:
    """A whole tensor in the form of a parameter that it will be copied into: this rank's part, if that is divided.

    `source` is the rank whose values all take; None: each has the same.
    """
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        device = parameter.to_local().device
        return distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=source)
    return value


class Exchange(NamedTuple):
    """DeepSpeed's Ulysses around an attention function.

    Attributes:
        ulysses: its module, `UlyssesSPAttentionHF`, which exchanges, calls the function and exchanges back.
    """

    ulysses: Any

    def attend(
        self, attend: Callable[..., tuple[Tensor, Tensor | None]], module: nn.Module, query: Tensor, key: Tensor,
        value: Tensor, pairs: VirtualPairs, scoring: Scoring, keywords: dict[str, Any], recorded: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The attention with virtual pairs, (B, T, H * e), of this rank's tokens; arguments as in `backends`.

        Ulysses drops masks: which keys are visible is decided by their order alone.

        Raises:
            ValueError: the call has scores of heads that Ulysses does not exchange, or is being recorded.
        """
        if scoring.bias is not None or scoring.sinks is not None or recorded:
            raise ValueError(
                f"Sequence parallelism gives {type(module).__name__} the tokens of all ranks, but position biases and "
                "attention sinks of other heads; nor can it be recorded: run without it."
            )
        heads, rank, ranks = query.shape[1], self.ulysses.sp_rank, self.ulysses.world_size

        def core(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
        ) -> tuple[Tensor, Tensor | None]:
            own = pairs if query.shape[1] == heads else block(pairs, rank, ranks)
            output, weights = attend(module, query, key, value, own, scoring._replace(mask=mask))
            return output.transpose(1, 2).contiguous(), weights

        ulysses = copy.copy(self.ulysses)  # with another function than the base model's
        ulysses.attn = core
        output: tuple[Tensor, Tensor | None] = ulysses(module, query, key, value, None, **keywords)
        return output


def exchange_in(found: Callable[..., Any], own: Callable[..., Any]) -> Exchange | None:
    """The exchange that an attention function makes around transformers' own; None if it is something else."""
    if found.__module__ != "deepspeed.runtime.sequence_parallel.ulysses_sp":
        return None
    ulysses: Any = inspect.getclosurevars(found).nonlocals.get("uattn")
    known = getattr(ulysses, "attn", None) is own and hasattr(ulysses, "sp_rank") and hasattr(ulysses, "world_size")
    return Exchange(ulysses) if known else None


class Ring(NamedTuple):
    """torch's `context_parallel` in the place of `scaled_dot_product_attention`.

    Attributes:
        group: the ranks that share each row.
    """

    group: torch.distributed.ProcessGroup

    def attend(
        self, attend: Callable[..., tuple[Tensor, Tensor | None]], module: nn.Module, query: Tensor, key: Tensor,
        value: Tensor, pairs: VirtualPairs, scoring: Scoring, keywords: dict[str, Any], recorded: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The attention with virtual pairs, (B, T, H, e), of this rank's tokens; arguments as for `Exchange.attend`.

        Raises:
            ValueError: no kernel takes the call, or it is being recorded.
        """
        try:
            if recorded:
                raise ValueError("Attention over keys that ranks share cannot be recorded.")
            output = merged.attention(query, key, value, pairs, scoring, self.group)
        except ValueError as error:
            raise ValueError(
                f"{type(module).__name__} runs under context parallelism. {error} accelerate.prepare drops causal "
                "masks; run without the rest, or without context parallelism."
            ) from None
        return output.transpose(1, 2).contiguous(), None


def ring_in(patched: Callable[..., Any]) -> Ring | None:
    """The ring that a function in the place of `scaled_dot_product_attention` runs; None if it is something else."""
    if patched.__module__ != "torch.distributed.tensor.experimental._context_parallel._attention":
        return None
    found: dict[str, Any] = dict(inspect.getclosurevars(patched).nonlocals)
    known = found.get("target_fn") is torch._C._nn.scaled_dot_product_attention and "device_mesh" in found
    return Ring(found["device_mesh"].get_group()) if known else None


def block(pairs: VirtualPairs, rank: int, ranks: int) -> VirtualPairs:
    """The pairs of the heads of one rank: of a block of query heads, or of the key/value heads that these share."""

    def part(tensor: Tensor) -> Tensor:
        heads = tensor.shape[1]
        return tensor.narrow(1, rank * heads // ranks, max(heads // ranks, 1))

    logs = pairs.log_weights
    if logs is not None and logs.shape[1] > 1:
        logs = part(logs)
    return pairs._replace(keys=part(pairs.keys), values=part(pairs.values), log_weights=logs)
