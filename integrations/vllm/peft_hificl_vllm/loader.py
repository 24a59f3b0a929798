"""The load format "hificl": the base model as another format loads it, and an adapter's pairs on its attention layers.

All that could make the answers other than those of transformers with the adapter is checked here, and refused before
the first layer is changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import vllm
from torch import nn
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from peft_hificl.names import MODULE, HeadShape
from peft_hificl.sharding import block

from .adapter import Adapter, Pairs, pairs_on, read

logger = init_logger("vllm.peft_hificl_vllm")  # vLLM shows its own alone

LOAD_FORMAT = "hificl"
VERSIONS = ("0.32", "0.33")  # whose classes the backends are written against
# Those of which vLLM's answers were compared with transformers', by tests/integration/test_vllm.py.  Another one may
# rotate queries in another basis than transformers does, and there the pairs would have other scores.
ARCHITECTURES = (
    "CohereForCausalLM", "Ernie4_5ForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM", "GemmaForCausalLM",
    "Glm4ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "LlavaForConditionalGeneration",
    "MistralForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM",
    "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "StableLmForCausalLM",
)  # fmt: skip
_CACHE_DTYPES = ("auto", "float16", "bfloat16")


def backend_path() -> str | None:
    """The attention backend of this platform, as vLLM registers it; None: there is none."""
    if current_platform.is_cpu():
        return "peft_hificl_vllm.cpu.HiFICLCPUBackend"
    if current_platform.is_cuda():
        return "peft_hificl_vllm.flash.HiFICLFlashBackend"
    return None


class HiFICLModelLoader(BaseModelLoader):
    """Loads a base model by another loader, and attaches an adapter.

    Args:
        load_config: of vLLM.  Its `model_loader_extra_config` has "adapter", the folder or Hub id of the adapter.  It
            may have "load_format", that of the base model ("auto"); "unverified", True to load an adapter on an
            architecture that is not in `ARCHITECTURES`; the rest is for the loader of the base model.

    Raises:
        ValueError: no adapter is given, or "unverified" is not a bool.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        extra: dict[str, Any] = dict(load_config.model_loader_extra_config)
        self.path = extra.pop("adapter", None)
        if not isinstance(self.path, str):
            raise ValueError(
                f"--load-format {LOAD_FORMAT} needs the folder of an adapter, found {self.path!r}: give "
                """--model-loader-extra-config '{"adapter": "FOLDER"}'."""
            )
        self.unverified = extra.pop("unverified", False)
        if not isinstance(self.unverified, bool):
            raise ValueError(
                f'"unverified" in --model-loader-extra-config must be true or false, found {self.unverified!r}.'
            )
        load_format = extra.pop("load_format", "auto")
        self.base = get_model_loader(replace(load_config, load_format=load_format, model_loader_extra_config=extra))
        if hasattr(self.base, "get_all_weights"):  # by which vLLM reloads weights, where a loader has it
            self.get_all_weights = self.base.get_all_weights

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        return self.base.get_external_weight_memory(vllm_config)

    def download_model(self, model_config: ModelConfig) -> None:
        self.base.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self.base.load_weights(model, model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """The base model with the adapter attached.

        Raises:
            ValueError: the adapter, the base model or a setting of vLLM is not supported.
        """
        check_engine(vllm_config, self.unverified)
        adapter = read(self.path)
        model = self.base.load_model(vllm_config, model_config, prefix)
        attach(model, adapter, vllm_config)
        return model


def check_engine(config: VllmConfig, unverified: bool = False) -> None:
    """Refuse settings of vLLM under which the answers could be wrong.

    Raises:
        ValueError: such a setting; the message names it, its value and what to do.
    """
    parallel, model = config.parallel_config, config.model_config
    version = ".".join(vllm.__version__.split(".")[:2])
    found = {
        f"vllm {vllm.__version__}": (version not in VERSIONS, f"install one of {', '.join(VERSIONS)}"),
        f"architecture {model.architecture!r}": (
            model.architecture not in ARCHITECTURES and not unverified,
            f"compared with transformers were {', '.join(ARCHITECTURES)}. Compare the answers yourself, with "
            '"unverified": true in --model-loader-extra-config',
        ),
        f"runner_type={model.runner_type!r}": (model.runner_type != "generate", "use a model that generates"),
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}": (
            parallel.pipeline_parallel_size > 1, "use --tensor-parallel-size",
        ),
        f"decode_context_parallel_size={parallel.decode_context_parallel_size}": (
            parallel.decode_context_parallel_size > 1, "leave it at 1",
        ),
        f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}": (
            parallel.prefill_context_parallel_size > 1, "leave it at 1",
        ),
        "speculative decoding (speculative_config)": (config.speculative_config is not None, "run without it"),
        "a KV connector (kv_transfer_config)": (
            config.kv_transfer_config is not None,
            "run without it: its keys do not say which adapter the cached tokens were computed with",
        ),
        "LoRA (lora_config)": (config.lora_config is not None, "merge the LoRA into the base model"),
        "attention_config.use_non_causal=True": (config.attention_config.use_non_causal, "leave it at False"),
        f"rswa_window={model.rswa_window}": (model.rswa_window is not None, "use another model"),
        "VLLM_BATCH_INVARIANT=1": (envs.VLLM_BATCH_INVARIANT, "unset it"),
    }  # fmt: skip
    for what, (refused, remedy) in found.items():
        if refused:
            raise ValueError(f"HiFICL does not support {what}: {remedy}.")


def attach(model: nn.Module, adapter: Adapter, config: VllmConfig) -> None:
    """Give the attention layers of a model the pairs of an adapter: on each rank, those of its heads.

    Raises:
        ValueError: an adapted module is not in the model, or its attention cannot be adapted; nothing is changed.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AttentionLayerBase)}
    sharing = [name for name, layer in layers.items() if getattr(layer, "kv_sharing_target_layer_name", None)]
    if sharing:
        raise ValueError(f"HiFICL does not support a model in which {sharing[0]!r} uses another layer's cache.")
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for module in adapter.missing(config.model_config.hf_text_config.num_hidden_layers):
        if _layers_in(module, layers, mapper):
            raise ValueError(
                f"The adapter is of {module!r} too, by its target_modules, but the file has no pairs of it: it is "
                "incomplete. Copy it again, or save the adapter again."
            )
    found: dict[Attention, Pairs] = {}
    for module in adapter.modules:
        layer = _layer_of(module, layers, mapper)
        reason = why_unsupported(layer)
        if reason is not None:
            raise ValueError(f"HiFICL cannot adapt {module!r} in vLLM: {reason}.")
        total = config.model_config.get_total_num_kv_heads()
        groups = layer.num_kv_heads * ranks if total >= ranks else total  # else each is on several ranks
        shape = HeadShape(layer.num_heads * ranks, layer.head_size, layer.head_size_v, groups)
        found[layer] = Pairs(block(pairs_on(adapter, module, shape), rank, ranks))
    logger.info("HiFICL: %d pairs a head on %d of %d attention layers.", adapter.config.n, len(found), len(layers))
    for layer, pairs in found.items():
        setattr(layer, MODULE, pairs.to(config.device_config.device))


def _layers_in(module: str, layers: dict[str, AttentionLayerBase], mapper: Any) -> list[AttentionLayerBase]:
    """vLLM's attention layers within a module of transformers."""
    inside = f"{module}."
    mapped = inside if mapper is None else next(iter(mapper.apply_list([inside])), inside)
    return [layer for name, layer in layers.items() if name.startswith(mapped)]


def _layer_of(module: str, layers: dict[str, AttentionLayerBase], mapper: Any) -> AttentionLayerBase:
    found = _layers_in(module, layers, mapper)
    if len(found) != 1:
        some = ", ".join(map(repr, list(layers)[:2])) or "none"
        raise ValueError(
            f"The adapter is of {module!r}, where vLLM's model has {len(found)} attention layers (it has {len(layers)} "
            f"in all: {some}, ...): serve the base model that it was trained on."
        )
    return found[0]


def why_unsupported(layer: AttentionLayerBase) -> str | None:
    """Why pairs cannot be mixed into the attention of a layer; None if they can."""
    if type(layer) is not Attention:
        return f"its attention is {type(layer).__name__}, not vLLM's Attention: leave it out with exclude_modules"
    name, wanted = ".".join(layer.attn_backend.full_cls_name()), backend_path()
    if wanted is None:
        return f"there is no backend for {current_platform.device_name}: run on a CPU or on CUDA"
    if name != wanted:
        return f"its attention backend is {name}, not HiFICL's: start vLLM with --attention-backend CUSTOM"
    impl: Any = layer.impl
    obstacles = {
        f"attn_type={layer.attn_type!r}": layer.attn_type != AttentionType.DECODER,
        f"kv_cache_dtype={layer.kv_cache_dtype!r}": layer.kv_cache_dtype not in _CACHE_DTYPES,
        f"logits_soft_cap={impl.logits_soft_cap}": bool(impl.logits_soft_cap),
        "ALiBi": impl.alibi_slopes is not None,
        "attention sinks": layer.has_sink,
        "bidirectional attention of images": layer.use_mm_prefix,
        f"head_size={layer.head_size} with FlashAttention 4 on this GPU": getattr(impl, "fa4_hd256", False),
        f"head_size_v={layer.head_size_v}, head_size={layer.head_size}": layer.head_size_v != layer.head_size,
    }
    found = next((what for what, holds in obstacles.items() if holds), None)
    remedy = "start with --kv-cache-dtype auto" if found and "kv_cache" in found else "use transformers for this model"
    return None if found is None else f"it has {found}, which its backend does not combine with pairs: {remedy}"
