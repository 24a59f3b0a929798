"""The zoo: a tiny random model of every architecture that HiFICL is tested on, and of those that it refuses.

Expected targets are written out by hand, so that they do not depend on the detection that they test.
``python -m tests.architectures`` writes ``docs/architectures.md`` from this table.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peft_hificl import HiFICLConfig

Inputs = dict[str, Tensor]
Config = dict[str, Any]

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
DOCUMENT = Path(__file__).parent.parent / "docs" / "architectures.md"
# Ids from here on stand for images, sounds and their marks: what `generate` must not make up.
FIRST_SPECIAL, MEDIA, AFTER, BEFORE, VOCABULARY = 90, 98, 95, 96, 99


# -- inputs -----------------------------------------------------------------------------------------------------------


def tensors(**spec: Any) -> Callable[[], Inputs]:
    """Inputs by name: a tuple is the shape of a random tensor, always the same."""

    def make() -> Inputs:
        seed = torch.Generator().manual_seed(1)
        # Copies: some models write into what they are given.
        return {k: torch.randn(v, generator=seed) if isinstance(v, tuple) else v.clone() for k, v in spec.items()}

    return make


def prompt(media: int = 0, around: tuple[list[int], list[int]] = ([], []), **spec: Any) -> Callable[[], Inputs]:
    """Two rows of text, the first left-padded, each with placeholders for ``media`` tokens of an image or sound.

    Further inputs are as in `tensors`; a function computes one from the ids.
    """
    middle = [*around[0], *[MEDIA] * media, *around[1]] or [10, 11]
    ids = torch.tensor([[0, 0, 1, *middle, 5, 6, 7], [1, 4, 9, *middle, 8, 9, 3]])
    spec = {k: v(ids) if callable(v) else v for k, v in spec.items()}
    return tensors(input_ids=ids, attention_mask=(ids != 0).long(), **spec)


def is_media(ids: Tensor) -> Tensor:
    return (ids == MEDIA).long()


def twice(*row: Any) -> Tensor:
    return torch.tensor([row, row])


# -- the two kinds of entries -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """An architecture that HiFICL adapts.

    Attributes:
        name: as transformers calls it.
        model: the model class.
        kind: a heading of the documentation.
        targets: what is adapted by default; ``{0,1}`` stands for either.
        config: arguments of the model's configuration class.
        inputs: makes the inputs of a forward pass (and of `generate`).
        quirks: what the *base model* does not do, and why: "flex_attention" (run correctly with it), "uncached"
            (generate without a cache at all), "padding" (generate left-padded rows alike with and without a cache).
            The tests check that it does not.
    """

    name: str
    model: str
    kind: str
    targets: str
    config: Config
    inputs: Callable[[], Inputs] = field(default_factory=prompt)
    quirks: dict[str, str] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return self.kind not in (ENCODER, DUAL, TOWER)

    @property
    def media(self) -> str:
        """What the inputs consist of."""
        for media, names in (("image", "pixel_values|patches"), ("audio", "input_features|input_values")):
            if any(re.search(names, name) for name in self.inputs()):
                return media
        return "text"


@dataclass(frozen=True)
class Refused:
    """An architecture that HiFICL cannot adapt; ``reason`` is part of the error that says so."""

    name: str
    model: str
    reason: str
    config: Config
    inputs: Callable[[], Inputs] = field(default_factory=prompt)

    @property
    def why(self) -> str:
        return self.reason if self.reason != NO_ATTENTION else "it has no attention"


def build(entry: Family | Refused) -> PreTrainedModel:
    """The model of an entry; the same weights every time."""
    torch.manual_seed(0)
    cls = getattr(transformers, entry.model)
    model = cls(cls.config_class(**entry.config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a gate that is closed at first would hide what lies behind it
                parameter.normal_(std=0.1)
    # PEFT freezes the model, and torch's matmul rounds differently for weights that want no gradient.
    return model.requires_grad_(False)


def forward_inputs(entry: Family | Refused, model: PreTrainedModel) -> Inputs:
    """The inputs of an entry, with a decoder prompt where the model's forward wants one."""
    more = {"decoder_input_ids": twice(1, 5, 6, 7, 8)} if model.config.is_encoder_decoder else {}
    return {**entry.inputs(), **more}


def adapt(model: PreTrainedModel) -> PeftModel:
    """The model with a random adapter on its default targets; the same one every time."""
    torch.manual_seed(1)
    return get_peft_model(model, HiFICLConfig(n=3, r=2, init_weights=False)).eval()


def expand(pattern: str) -> list[str]:
    """
    >>> expand("layers.{0,2}.self_attn")
    ['layers.0.self_attn', 'layers.2.self_attn']
    """
    parts = re.split(r"\{([^}]*)\}", pattern)
    return ["".join(p) for p in itertools.product(*(s.split(",") if i % 2 else [s] for i, s in enumerate(parts)))]


def offers(model: PreTrainedModel, implementation: str) -> bool:
    """Whether transformers lets a model run with an attention implementation; if so, it is set."""
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        return False
    return True


# -- configurations ---------------------------------------------------------------------------------------------------

IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MHA = {**IDS, **SIZES, "max_position_embeddings": 64}
GQA = {**MHA, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 16}  # heads * head_dim != hidden_size
MLA = {
    **MHA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16,
}  # fmt: skip
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = {
    **IDS, "d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    **{f"{side}_{what}": value for side in ("encoder", "decoder")
       for what, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "d_model": 32,
    "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
}  # fmt: skip
OPT = {**MHA, "ffn_dim": 48, "word_embed_proj_dim": 32}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
KIMI = {
    "num_experts": 4, "num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense", "sparse"], "linear_head_dim": 8, "linear_num_heads": 4,
}  # fmt: skip

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {
    **HYBRID, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_chunk_size": 4,
}  # fmt: skip
ZAMBA = {
    **MHA, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4,
    "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_d_state": 8, "use_mamba_kernels": False,
}  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 1e4}
VISION = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 3}  # 4 patches
VISION16 = {**VISION, "image_size": 16}  # 16 patches
BLIP_VISION = {**VISION, "initializer_range": 0.02}  # its default makes every image the same
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
SIGLIP16 = {**SIGLIP, "image_size": 16}
QFORMER = {**SIZES, "vocab_size": VOCABULARY, "encoder_hidden_size": 32}
QWEN_VISION = {
    "depth": 2, "embed_dim": 32, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
    "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
QWEN2_VISION = {k: v for k, v in QWEN_VISION.items() if k not in ("out_hidden_size", "intermediate_size")}
QWEN25_VISION = {**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 8}
QWEN3_VISION = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
QWEN_IDS = {
    "image_token_id": MEDIA,
    "video_token_id": 97,
    "vision_start_token_id": BEFORE,
    "vision_end_token_id": AFTER,
}
GLM_IDS = {
    "image_token_id": MEDIA, "video_token_id": 97, "image_start_token_id": BEFORE, "image_end_token_id": AFTER,
    "video_start_token_id": 94, "video_end_token_id": 93,
}  # fmt: skip
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
MROPE16 = {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}
WHISPER_ENCODER = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 8,
}  # fmt: skip
VOXTRAL_ENCODER = {**SIZES, "intermediate_size": 128, "head_dim": 8, "num_mel_bins": 8, "max_source_positions": 8}

one_image = prompt(4, pixel_values=(2, 3, 8, 8))
large_image = prompt(4, pixel_values=(2, 3, 16, 16))
tiled_image = prompt(10, pixel_values=(2, 2, 3, 8, 8), image_sizes=twice(8, 8))
qwen_image = prompt(
    4, ([BEFORE], [AFTER]), pixel_values=(32, 96), image_grid_thw=twice(1, 4, 4), mm_token_type_ids=is_media
)
qwen_flat_image = prompt(
    4, ([BEFORE], [AFTER]), pixel_values=(32, 48), image_grid_thw=twice(1, 4, 4), mm_token_type_ids=is_media
)
grid = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)


def text(model_type: str, base: Config = GQA, **config: Any) -> Config:
    """A text model inside another's configuration."""
    return {"model_type": model_type, **base, **config}


# -- the table --------------------------------------------------------------------------------------------------------

DECODER = "Text decoders"
ENCODER = "Encoders"
SEQ2SEQ = "Encoder-decoders"
VISION_LANGUAGE = "Vision-language models"
AUDIO = "Audio and speech models"
DUAL = "Dual encoders"
TOWER = "Towers on their own"

LAYERS = "model.layers.{0,1}.self_attn"
GPT_LAYERS = "transformer.h.{0,1}.attn"
BERT_LAYERS = "encoder.layer.{0,1}.attention.self"
BART_LAYERS = "model.decoder.layers.{0,1}.self_attn"
T5_LAYERS = "decoder.block.{0,1}.layer.0.SelfAttention"
IN_LANGUAGE_MODEL = "model.language_model.layers.{0,1}.self_attn"
IN_TEXT_MODEL = "model.text_model.layers.{0,1}.self_attn"

Quirks = dict[str, str]
T5_FLEX = {"flex_attention": "transformers' position bias has a batch of one, which flex_attention overruns"}
DOGE_FLEX = {"flex_attention": "Doge drops its mask with it, the causal part included"}
GRANITE_SPEECH_FLEX = {"flex_attention": "its audio projector has one row of queries for many of keys"}
MINIMAX_PADDING = {"padding": "its lightning attention treats padding differently once there is a cache"}
KOSMOS_PADDING = {"padding": "its positions count padding once there is a cache"}
BLIP_CACHE = {"uncached": "it generates from embeddings, for which transformers always uses a cache"}


def decoder(
    name: str, model: str, targets: str = LAYERS, base: Config = GQA, quirks: Quirks | None = None, **config: Any
) -> Family:
    return Family(name, model, DECODER, targets, {**base, **config}, quirks=quirks or {})


def encoder(name: str, model: str, targets: str, base: Config = MHA, **config: Any) -> Family:
    return Family(name, model, ENCODER, targets, {**base, **config})


def seq2seq(
    name: str, model: str, targets: str = BART_LAYERS, base: Config = BART, quirks: Quirks | None = None, **config: Any
) -> Family:
    return Family(name, model, SEQ2SEQ, targets, {**base, **config}, quirks=quirks or {})


def vision(
    name: str, model: str, targets: str, inputs: Callable[[], Inputs], quirks: Quirks | None = None, **config: Any
) -> Family:
    return Family(name, model, VISION_LANGUAGE, targets, config, inputs, quirks or {})


def audio(
    name: str, model: str, targets: str, inputs: Callable[[], Inputs], quirks: Quirks | None = None, **config: Any
) -> Family:
    return Family(name, model, AUDIO, targets, config, inputs, quirks or {})


def tower(name: str, model: str, targets: str, inputs: Callable[[], Inputs], base: Config, **config: Any) -> Family:
    return Family(name, model, TOWER, targets, {**base, **config}, inputs)


# fmt: off
FAMILIES: tuple[Family, ...] = (
    decoder("afmoe", "AfmoeForCausalLM", base=WIDE, **SLIDING, **EXPERTS, num_shared_experts=1, num_dense_layers=1),
    decoder("apertus", "ApertusForCausalLM"),
    decoder("arcee", "ArceeForCausalLM"),
    decoder("bailing_hybrid", "BailingHybridForCausalLM", "model.layers.1.self_attn", MLA, **HYBRID, **KIMI),
    decoder("bamba", "BambaForCausalLM", "model.layers.1.self_attn", **MAMBA, attn_layer_indices=[1]),
    decoder("biogpt", "BioGptForCausalLM", "biogpt.layers.{0,1}.self_attn", MHA),
    decoder("bitnet", "BitNetForCausalLM"),
    decoder("cohere", "CohereForCausalLM"),
    decoder("cohere2", "Cohere2ForCausalLM", **SLIDING),
    decoder("ctrl", "CTRLLMHeadModel", "transformer.h.{0,1}.multi_head_attention", GPT2, dff=48),
    decoder("dbrx", "DbrxForCausalLM", "transformer.blocks.{0,1}.norm_attn_norm.attn", IDS, d_model=32, n_heads=4,
            n_layers=2, max_seq_len=64, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}),
    decoder("deepseek_v2", "DeepseekV2ForCausalLM", base=MLA, **ROUTED),
    decoder("deepseek_v3", "DeepseekV3ForCausalLM", base=MLA, **{**ROUTED, "v_head_dim": 12}),
    decoder("diffllama", "DiffLlamaForCausalLM"),
    decoder("doge", "DogeForCausalLM", quirks=DOGE_FLEX),
    decoder("dots1", "Dots1ForCausalLM", base=WIDE, **ROUTED),
    decoder("ernie4_5", "Ernie4_5ForCausalLM"),
    decoder("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
            moe_layer_start_index=0),
    decoder("exaone4", "Exaone4ForCausalLM", **SLIDING),
    decoder("falcon_h1", "FalconH1ForCausalLM", **MAMBA, mamba_d_ssm=64),
    decoder("flex_olmo", "FlexOlmoForCausalLM", **EXPERTS),
    decoder("gemma", "GemmaForCausalLM", base=WIDE),
    decoder("gemma2", "Gemma2ForCausalLM", base=WIDE, **SLIDING, attn_logit_softcapping=2.0),
    decoder("gemma3", "Gemma3ForCausalLM", base=WIDE, **SLIDING),
    decoder("gemma3n", "Gemma3nForCausalLM", base=WIDE, **SLIDING, num_kv_shared_layers=0, laurel_rank=8,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
            activation_sparsity_pattern=[0.0, 0.0]),
    decoder("gemma4", "Gemma4ForCausalLM", **SLIDING, hidden_size_per_layer_input=8, global_head_dim=16,
            vocab_size_per_layer_input=VOCABULARY),
    decoder("glm", "GlmForCausalLM", base=WIDE),
    decoder("glm4", "Glm4ForCausalLM", base=WIDE),
    decoder("glm4_moe", "Glm4MoeForCausalLM", base=WIDE, **ROUTED),
    decoder("glm4_moe_lite", "Glm4MoeLiteForCausalLM", base=MLA, **ROUTED),
    decoder("gpt2", "GPT2LMHeadModel", GPT_LAYERS, GPT2),
    decoder("gpt_bigcode", "GPTBigCodeForCausalLM", GPT_LAYERS, GPT2),
    decoder("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.{0,1}.attention", MHA),
    decoder("gpt_oss", "GptOssForCausalLM", base=WIDE, **SLIDING, **LOCAL_EXPERTS),
    decoder("granite", "GraniteForCausalLM", attention_multiplier=0.3),
    decoder("granite_swa", "GraniteSWAForCausalLM", sliding_window=4),
    decoder("granitemoe", "GraniteMoeForCausalLM", **LOCAL_EXPERTS),
    decoder("granitemoehybrid", "GraniteMoeHybridForCausalLM", "model.layers.1.self_attn", **HYBRID, **MAMBA,
            **LOCAL_EXPERTS, shared_intermediate_size=16),
    decoder("granitemoeshared", "GraniteMoeSharedForCausalLM", **LOCAL_EXPERTS, shared_intermediate_size=16),
    decoder("helium", "HeliumForCausalLM", head_dim=8),
    decoder("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", base=WIDE),
    decoder("jamba", "JambaForCausalLM", "model.layers.1.self_attn", attn_layer_period=2, attn_layer_offset=1,
            num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    decoder("jetmoe", "JetMoeForCausalLM", "model.layers.{0,1}.self_attention", **LOCAL_EXPERTS, kv_channels=8),
    decoder("kimi_linear", "KimiLinearForCausalLM", "model.layers.1.self_attn", MLA,
            **{**HYBRID, **KIMI, "q_lora_rank": None}),
    decoder("lfm2", "Lfm2ForCausalLM", "model.layers.1.self_attn", layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False),
    decoder("lfm2_moe", "Lfm2MoeForCausalLM", "model.layers.1.self_attn", layer_types=["conv", "full_attention"],
            **EXPERTS, num_dense_layers=1),
    decoder("llama", "LlamaForCausalLM"),
    decoder("llama4", "Llama4ForCausalLM", base=WIDE, **LOCAL_EXPERTS, intermediate_size_mlp=48, no_rope_layers=[1, 0],
            attention_chunk_size=4),
    decoder("longcat_flash", "LongcatFlashForCausalLM", "model.layers.0.self_attn.{0,1}", MLA, num_layers=1, head_dim=4,
            ffn_hidden_size=48, moe_topk=2, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=16),
    decoder("mimo_v2_flash", "MiMoV2FlashForCausalLM", **SLIDING, **ROUTED, head_dim=12, v_head_dim=8),
    decoder("minicpm3", "MiniCPM3ForCausalLM", base=MLA),
    decoder("minimax", "MiniMaxForCausalLM", "model.layers.1.self_attn", WIDE, **HYBRID, **LOCAL_EXPERTS, block_size=4,
            quirks=MINIMAX_PADDING),
    decoder("ministral", "MinistralForCausalLM", base=WIDE, **SLIDING),
    decoder("mistral", "MistralForCausalLM", sliding_window=4),
    decoder("mixtral", "MixtralForCausalLM", **LOCAL_EXPERTS),
    decoder("modernbert_decoder", "ModernBertDecoderForCausalLM", "model.layers.{0,1}.attn", MHA, local_attention=8),
    decoder("nanochat", "NanoChatForCausalLM"),
    decoder("nemotron", "NemotronForCausalLM", base=WIDE),
    decoder("nemotron_h", "NemotronHForCausalLM", "model.layers.1.mixer",
            **{**WIDE, "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "full_attention", "mlp"]},
            mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, chunk_size=4),
    decoder("olmo", "OlmoForCausalLM"),
    decoder("olmo2", "Olmo2ForCausalLM"),
    decoder("olmo3", "Olmo3ForCausalLM", **SLIDING),
    decoder("olmo_hybrid", "OlmoHybridForCausalLM", "model.layers.1.self_attn", **LINEAR),
    decoder("olmoe", "OlmoeForCausalLM", **EXPERTS),
    decoder("opt", "OPTForCausalLM", BART_LAYERS, OPT),
    decoder("persimmon", "PersimmonForCausalLM", base=MHA),
    decoder("phi", "PhiForCausalLM"),
    decoder("phi3", "Phi3ForCausalLM", sliding_window=4),
    decoder("phimoe", "PhimoeForCausalLM", **LOCAL_EXPERTS),
    decoder("qwen2", "Qwen2ForCausalLM"),
    decoder("qwen2_moe", "Qwen2MoeForCausalLM", **SHARED_EXPERT),
    decoder("qwen3", "Qwen3ForCausalLM", base=WIDE),
    decoder("qwen3_5", "Qwen3_5ForCausalLM", "model.layers.1.self_attn", **LINEAR, head_dim=32),
    decoder("qwen3_moe", "Qwen3MoeForCausalLM", base=WIDE, **EXPERTS),
    decoder("qwen3_next", "Qwen3NextForCausalLM", "model.layers.1.self_attn", WIDE, **LINEAR, **SHARED_EXPERT),
    decoder("recurrent_gemma", "RecurrentGemmaForCausalLM", "model.layers.1.temporal_block", WIDE, lru_width=32,
            attention_window_size=4, block_types=["recurrent", "attention"]),
    decoder("seed_oss", "SeedOssForCausalLM", base=WIDE),
    decoder("smollm3", "SmolLM3ForCausalLM"),
    decoder("stablelm", "StableLmForCausalLM"),
    decoder("starcoder2", "Starcoder2ForCausalLM", sliding_window=4),
    decoder("vaultgemma", "VaultGemmaForCausalLM", base=WIDE, **SLIDING, attn_logit_softcapping=2.0),
    decoder("youtu", "YoutuForCausalLM", base=MLA),
    decoder("zamba", "ZambaForCausalLM", "model.layers.{1,3}.shared_transf.self_attn", ZAMBA, n_mamba_heads=2,
            mamba_dt_rank=4),
    decoder("zamba2", "Zamba2ForCausalLM", "model.layers.{1,3}.shared_transformer.self_attn", ZAMBA, n_mamba_heads=4,
            mamba_headdim=16, chunk_size=4, hybrid_layer_ids=[1, 3]),

    encoder("albert", "AlbertForMaskedLM", "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
            embedding_size=16),
    encoder("bert", "BertForMaskedLM", f"bert.{BERT_LAYERS}"),
    encoder("camembert", "CamembertForMaskedLM", f"roberta.{BERT_LAYERS}"),
    encoder("distilbert", "DistilBertForMaskedLM", "distilbert.transformer.layer.{0,1}.attention", IDS, dim=32,
            hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64),
    encoder("electra", "ElectraForMaskedLM", f"electra.{BERT_LAYERS}", embedding_size=16),
    encoder("ernie", "ErnieForMaskedLM", f"ernie.{BERT_LAYERS}"),
    encoder("esm", "EsmForMaskedLM", f"esm.{BERT_LAYERS}", position_embedding_type="rotary", mask_token_id=4),
    encoder("eurobert", "EuroBertForMaskedLM", LAYERS, GQA),
    encoder("layoutlm", "LayoutLMForMaskedLM", f"layoutlm.{BERT_LAYERS}"),
    encoder("mobilebert", "MobileBertForMaskedLM", f"mobilebert.{BERT_LAYERS}", embedding_size=16, true_hidden_size=16,
            intra_bottleneck_size=16),
    encoder("modernbert", "ModernBertForMaskedLM", "model.layers.{0,1}.attn", local_attention=8),
    encoder("nomic_bert", "NomicBertForMaskedLM", "nomic_bert.layers.{0,1}.self_attn"),
    encoder("roberta", "RobertaForMaskedLM", f"roberta.{BERT_LAYERS}"),
    encoder("xlm_roberta", "XLMRobertaForMaskedLM", f"roberta.{BERT_LAYERS}"),

    seq2seq("bart", "BartForConditionalGeneration"),
    seq2seq("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    seq2seq("blenderbot", "BlenderbotForConditionalGeneration"),
    seq2seq("encoder_decoder", "EncoderDecoderModel", f"decoder.bert.{BERT_LAYERS}", {}, encoder=text("bert", MHA),
            decoder=text("bert", MHA, is_decoder=True, add_cross_attention=True), decoder_start_token_id=1,
            pad_token_id=0),
    seq2seq("longt5", "LongT5ForConditionalGeneration", T5_LAYERS, T5),
    seq2seq("m2m_100", "M2M100ForConditionalGeneration"),
    seq2seq("marian", "MarianMTModel"),
    seq2seq("mbart", "MBartForConditionalGeneration"),
    seq2seq("mt5", "MT5ForConditionalGeneration", T5_LAYERS, T5, T5_FLEX),
    seq2seq("nllb_moe", "NllbMoeForConditionalGeneration", num_experts=2, expert_capacity=8),
    seq2seq("pegasus", "PegasusForConditionalGeneration"),
    seq2seq("plbart", "PLBartForConditionalGeneration"),
    seq2seq("switch_transformers", "SwitchTransformersForConditionalGeneration", T5_LAYERS, T5, num_experts=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    seq2seq("t5", "T5ForConditionalGeneration", T5_LAYERS, T5, T5_FLEX),
    seq2seq("t5gemma", "T5GemmaForConditionalGeneration", BART_LAYERS, {"vocab_size": VOCABULARY},
            encoder={**WIDE, **SLIDING}, decoder={**WIDE, **SLIDING}),
    seq2seq("umt5", "UMT5ForConditionalGeneration", T5_LAYERS, T5, T5_FLEX),

    vision("aria", "AriaForConditionalGeneration", IN_LANGUAGE_MODEL, prompt(2, pixel_values=(2, 3, 8, 8)),
           text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
           vision_config={"model_type": "idefics3_vision", **VISION}, image_token_index=MEDIA,
           projector_patch_to_query_dict={4: 2}),
    vision("aya_vision", "AyaVisionForConditionalGeneration", IN_LANGUAGE_MODEL, large_image,
           text_config=text("cohere2", **SLIDING), vision_config=SIGLIP16, image_token_index=MEDIA),
    vision("blip_2", "Blip2ForConditionalGeneration", f"language_model.{BART_LAYERS}",
           prompt(3, pixel_values=(2, 3, 8, 8)), BLIP_CACHE, text_config=text("opt", OPT), vision_config=BLIP_VISION,
           qformer_config=QFORMER, num_query_tokens=3, image_token_index=MEDIA),
    vision("blip_2+t5", "Blip2ForConditionalGeneration", f"language_model.{T5_LAYERS}",
           prompt(3, pixel_values=(2, 3, 8, 8)), T5_FLEX, text_config=text("t5", T5), vision_config=BLIP_VISION,
           qformer_config=QFORMER, num_query_tokens=3, image_token_index=MEDIA),
    vision("chameleon", "ChameleonForConditionalGeneration", LAYERS, prompt(16, pixel_values=(2, 3, 8, 8)), **GQA,
           vq_config={"embed_dim": 2, "num_embeddings": 10, "latent_channels": 8, "resolution": 8, "base_channels": 32,
                      "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": []},
           vocabulary_map={"<image>": MEDIA, **{f"IMGIMG{c}Z": 20 + i for i, c in enumerate("ABCDEFGHIJ")}}),
    vision("cohere2_vision", "Cohere2VisionForConditionalGeneration", IN_LANGUAGE_MODEL, large_image,
           text_config=text("cohere2", **SLIDING), vision_config=SIGLIP16, image_token_id=MEDIA,
           alignment_intermediate_size=32),
    vision("deepseek_vl", "DeepseekVLForConditionalGeneration", IN_LANGUAGE_MODEL, one_image,
           text_config=text("llama"), vision_config=SIGLIP, image_token_id=MEDIA),
    vision("emu3", "Emu3ForConditionalGeneration", IN_TEXT_MODEL,
           prompt(8 * 9, pixel_values=(2, 3, 8, 8), image_sizes=twice(8, 8)),
           text_config={**GQA, "max_position_embeddings": 128},
           vq_config={"codebook_size": 10, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1],
                      "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "temporal_downsample_factor": 1},
           vocabulary_map={"<image>": MEDIA, "<|extra_200|>": 18,
                           **{f"<|visual token {i:06}|>": 20 + i for i in range(10)}}, image_token_id=MEDIA),
    vision("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", IN_LANGUAGE_MODEL, qwen_flat_image,
           text_config={**GQA, **MROPE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16],
                        "mlp_layer_types": ["dense", "sparse"]},
           vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4},
           **GLM_IDS),
    vision("florence2", "Florence2ForConditionalGeneration", "model.language_model.decoder.layers.{0,1}.self_attn",
           prompt(5, pixel_values=(2, 3, 16, 16)), text_config=text("bart", BART), image_token_id=MEDIA,
           vision_config={"embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2], "depths": [1, 1],
                          "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "window_size": 2,
                          "patch_prenorm": [False, True], "projection_dim": 32, "max_position_embeddings": 10,
                          "max_temporal_embeddings": 5}),
    vision("fuyu", "FuyuForCausalLM", IN_LANGUAGE_MODEL, prompt(4, image_patches=(2, 4, 48)), **MHA,
           text_config=text("persimmon", MHA), image_size=8, patch_size=4, image_token_id=MEDIA),
    vision("gemma3", "Gemma3ForConditionalGeneration", IN_LANGUAGE_MODEL, one_image, text_config={**WIDE, **SLIDING},
           vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=MEDIA),
    vision("gemma4", "Gemma4ForConditionalGeneration", IN_LANGUAGE_MODEL,
           prompt(4, pixel_values=(2, 16, 48), image_position_ids=torch.stack([grid, grid]),
                  mm_token_type_ids=is_media),
           text_config={**GQA, **SLIDING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
                        "global_head_dim": 16},
           vision_config={"model_type": "gemma4_vision", **SIZES, "num_key_value_heads": 4, "head_dim": 8,
                          "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 16},
           image_token_id=MEDIA, video_token_id=97, audio_token_id=96, boi_token_id=95, eoi_token_id=94,
           boa_token_id=93),
    vision("glm4v", "Glm4vForConditionalGeneration", IN_LANGUAGE_MODEL, qwen_image, **GLM_IDS,
           text_config={**GQA, "rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
           vision_config={**QWEN25_VISION, "image_size": 16}),
    vision("got_ocr2", "GotOcr2ForConditionalGeneration", IN_LANGUAGE_MODEL, prompt(4, pixel_values=(2, 3, 32, 32)),
           text_config=text("qwen2"), image_token_index=MEDIA,
           vision_config={**BLIP_VISION, "output_channels": 16, "image_size": 32, "mlp_dim": 48, "window_size": 2,
                          "global_attn_indexes": [1]}),
    vision("idefics", "IdeficsForVisionText2Text", LAYERS,
           prompt(pixel_values=(2, 1, 3, 8, 8), image_attention_mask=lambda ids: torch.ones_like(ids)[..., None]),
           **MHA, alpha_initializer="ones", use_resampler=True,
           vision_config={**{k: v for k, v in VISION.items() if k != "hidden_size"}, "embed_dim": 32},
           perceiver_config={"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
                             "resampler_head_dim": 8}),
    vision("idefics2", "Idefics2ForConditionalGeneration", IN_TEXT_MODEL, prompt(3, pixel_values=(2, 1, 3, 8, 8)),
           text_config=text("mistral"), vision_config=VISION, image_token_id=MEDIA,
           perceiver_config={"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4,
                             "resampler_head_dim": 8, "num_key_value_heads": 2}),
    vision("idefics3", "Idefics3ForConditionalGeneration", IN_TEXT_MODEL, prompt(4, pixel_values=(2, 1, 3, 16, 16)),
           text_config=text("llama"), vision_config=VISION16, image_token_id=MEDIA),
    vision("instructblip", "InstructBlipForConditionalGeneration", f"language_model.{BART_LAYERS}",
           prompt(3, pixel_values=(2, 3, 8, 8), qformer_input_ids=twice(1, 5, 6)), BLIP_CACHE,
           text_config=text("opt", OPT), vision_config=BLIP_VISION, qformer_config=QFORMER, num_query_tokens=3,
           image_token_index=MEDIA),
    vision("internvl", "InternVLForConditionalGeneration", IN_LANGUAGE_MODEL, large_image, text_config=text("qwen2"),
           vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, image_token_id=MEDIA),
    vision("janus", "JanusForConditionalGeneration", IN_LANGUAGE_MODEL, one_image, text_config=text("llama"),
           vision_config={**VISION, "projection_dim": 32, "num_image_tokens": 4, "depth": 1}, image_token_id=MEDIA,
           vq_config={"num_embeddings": 10, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
                      "num_res_blocks": 1, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32,
                      "num_hidden_layers": 1}),
    vision("kosmos2", "Kosmos2ForConditionalGeneration", "text_model.model.layers.{0,1}.self_attn",
           prompt(3, pixel_values=(2, 3, 8, 8), image_embeds_position_mask=is_media), KOSMOS_PADDING,
           vision_config=VISION,
           text_config={**IDS, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4,
                        "max_position_embeddings": 64}, latent_query_num=3),
    vision("lfm2_vl", "Lfm2VlForConditionalGeneration", "model.language_model.layers.1.self_attn",
           prompt(4, pixel_values=(2, 16, 48), spatial_shapes=twice(4, 4),
                  pixel_attention_mask=torch.ones(2, 16, dtype=torch.long)),
           text_config=text("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
           vision_config={"model_type": "siglip2_vision_model", **SIZES, "patch_size": 4, "num_patches": 16},
           image_token_id=MEDIA, projector_hidden_size=32),
    vision("llama4", "Llama4ForConditionalGeneration", "language_model.model.layers.{0,1}.self_attn", large_image,
           text_config={**WIDE, **LOCAL_EXPERTS, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0],
                        "attention_chunk_size": 4},
           vision_config={**VISION16, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 32,
                          "projector_output_dim": 32, "vision_output_dim": 32},
           image_token_index=MEDIA, boi_token_index=97, eoi_token_index=96),
    vision("llava", "LlavaForConditionalGeneration", IN_LANGUAGE_MODEL, one_image, text_config=text("llama"),
           vision_config=CLIP, image_token_index=MEDIA),
    vision("llava_next", "LlavaNextForConditionalGeneration", IN_LANGUAGE_MODEL, tiled_image,
           text_config=text("mistral"), vision_config=CLIP, image_token_index=MEDIA, image_grid_pinpoints=[[8, 8]]),
    vision("llava_next_video", "LlavaNextVideoForConditionalGeneration", IN_LANGUAGE_MODEL, tiled_image,
           text_config=text("llama"), vision_config=CLIP, image_token_index=MEDIA, video_token_index=97,
           image_grid_pinpoints=[[8, 8]]),
    vision("llava_onevision", "LlavaOnevisionForConditionalGeneration", IN_LANGUAGE_MODEL, tiled_image,
           text_config=text("qwen2"), vision_config=SIGLIP, image_token_index=MEDIA, video_token_index=97,
           image_grid_pinpoints=[[8, 8]]),
    vision("mistral3", "Mistral3ForConditionalGeneration", IN_LANGUAGE_MODEL,
           prompt(4, pixel_values=(2, 3, 16, 16), image_sizes=twice(16, 16)), text_config=text("mistral"),
           vision_config={"model_type": "pixtral", **VISION16, "head_dim": 8}, image_token_index=MEDIA),
    vision("mllama", "MllamaForConditionalGeneration", "model.language_model.layers.{0,2}.self_attn",
           prompt(1, pixel_values=(2, 1, 1, 3, 8, 8), aspect_ratio_ids=twice(1), aspect_ratio_mask=twice([1]),
                  cross_attention_mask=lambda ids: torch.ones_like(ids)[..., None, None]),
           text_config={**GQA, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE},
           vision_config={**VISION, "attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 64,
                          "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
           image_token_index=MEDIA),
    vision("ovis2", "Ovis2ForConditionalGeneration", IN_LANGUAGE_MODEL, large_image, text_config=text("qwen2"),
           vision_config={**VISION16, "hidden_stride": 2, "num_visual_indicator_tokens": 5, "vocab_size": 50},
           image_token_id=MEDIA, visual_indicator_token_ids=[90, 91, 92, 93, 94], vocab_size=VOCABULARY,
           hidden_size=32),
    vision("paligemma", "PaliGemmaForConditionalGeneration", IN_LANGUAGE_MODEL, one_image,
           text_config=text("gemma", WIDE), vision_config={**SIGLIP, "projection_dim": 32}, projection_dim=32,
           image_token_index=MEDIA),
    vision("pix2struct", "Pix2StructForConditionalGeneration", "decoder.layer.{0,1}.self_attention.attention",
           lambda: {"flattened_patches": torch.cat([torch.ones(2, 4, 2), tensors(x=(2, 4, 12))()["x"]], -1)}, T5_FLEX,
           text_config={**IDS, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                        "decoder_start_token_id": 1},
           vision_config={"hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8,
                          "num_hidden_layers": 2, "num_attention_heads": 4}),
    vision("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", IN_LANGUAGE_MODEL, qwen_image,
           text_config={**GQA, **MROPE}, vision_config=QWEN25_VISION, **QWEN_IDS),
    vision("qwen2_vl", "Qwen2VLForConditionalGeneration", IN_LANGUAGE_MODEL, qwen_image,
           text_config={**GQA, **MROPE}, vision_config=QWEN2_VISION, **QWEN_IDS),
    vision("qwen3_5", "Qwen3_5ForConditionalGeneration", "model.language_model.layers.1.self_attn", qwen_image,
           text_config={**GQA, **LINEAR, "head_dim": 32, "rope_parameters": {
               **ROPE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}},
           vision_config={**QWEN_VISION, "num_position_embeddings": 16}, **QWEN_IDS),
    vision("qwen3_vl", "Qwen3VLForConditionalGeneration", IN_LANGUAGE_MODEL, qwen_image,
           text_config={**WIDE, **MROPE16}, vision_config=QWEN3_VISION, **QWEN_IDS),
    vision("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", IN_LANGUAGE_MODEL, qwen_image,
           text_config={**WIDE, **MROPE16, **EXPERTS}, vision_config=QWEN3_VISION, **QWEN_IDS),
    vision("smolvlm", "SmolVLMForConditionalGeneration", IN_TEXT_MODEL, prompt(4, pixel_values=(2, 1, 3, 16, 16)),
           text_config=text("llama"), vision_config=VISION16, image_token_id=MEDIA),
    vision("t5gemma2", "T5Gemma2ForConditionalGeneration", BART_LAYERS, one_image, decoder=WIDE,
           encoder={"text_config": WIDE, "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": MEDIA},
           image_token_index=MEDIA),
    vision("video_llava", "VideoLlavaForConditionalGeneration", IN_LANGUAGE_MODEL,
           prompt(4, pixel_values_images=(2, 3, 8, 8)), text_config=text("llama"), vision_config=CLIP,
           image_token_index=MEDIA, video_token_index=97, image_seq_length=4),
    vision("vipllava", "VipLlavaForConditionalGeneration", IN_LANGUAGE_MODEL, one_image, text_config=text("llama"),
           vision_config=CLIP, image_token_index=MEDIA, vision_feature_layers=[-2, -1]),
    vision("vision_encoder_decoder", "VisionEncoderDecoderModel", f"decoder.{GPT_LAYERS}",
           tensors(pixel_values=(2, 3, 8, 8)), encoder={"model_type": "vit", **VISION},
           decoder=text("gpt2", GPT2, is_decoder=True, add_cross_attention=True), decoder_start_token_id=1,
           pad_token_id=0),

    audio("audioflamingo3", "AudioFlamingo3ForConditionalGeneration", IN_LANGUAGE_MODEL,
          prompt(4, input_features=(2, 8, 16), input_features_mask=torch.ones(2, 16, dtype=torch.long)),
          text_config=text("qwen2"), audio_config={"model_type": "audioflamingo3_encoder", **VOXTRAL_ENCODER},
          audio_token_id=MEDIA),
    audio("granite_speech", "GraniteSpeechForConditionalGeneration", IN_LANGUAGE_MODEL,
          prompt(3, input_features=(2, 15, 8)), GRANITE_SPEECH_FLEX, text_config=text("granite"),
          audio_token_index=MEDIA,
          projector_config={"model_type": "blip_2_qformer", **QFORMER}, has_lora_adapter=False,
          encoder_config={"input_dim": 8, "num_layers": 2, "hidden_dim": 32, "num_heads": 2, "dim_head": 16,
                          "output_dim": 10, "context_size": 5, "max_pos_emb": 8, "conv_kernel_size": 3}),
    audio("moonshine", "MoonshineForConditionalGeneration", BART_LAYERS, tensors(input_values=(2, 2000)), **IDS,
          hidden_size=32, intermediate_size=48,
          **{f"{side}_num_{what}": n for side in ("encoder", "decoder")
             for what, n in (("hidden_layers", 2), ("attention_heads", 4), ("key_value_heads", 4))}),
    audio("qwen2_audio", "Qwen2AudioForConditionalGeneration", IN_LANGUAGE_MODEL,
          prompt(4, input_features=(2, 8, 16), feature_attention_mask=torch.ones(2, 16, dtype=torch.long)),
          text_config=text("qwen2"), audio_config={"model_type": "qwen2_audio_encoder", **WHISPER_ENCODER},
          audio_token_index=MEDIA),
    audio("speech_to_text", "Speech2TextForConditionalGeneration", BART_LAYERS, tensors(input_features=(2, 20, 8)),
          **BART, max_source_positions=32, max_target_positions=32, conv_channels=16, input_feat_per_channel=8),
    audio("voxtral", "VoxtralForConditionalGeneration", IN_LANGUAGE_MODEL, prompt(2, input_features=(2, 8, 16)),
          text_config=text("llama"), audio_config={"model_type": "voxtral_encoder", **VOXTRAL_ENCODER},
          audio_token_id=MEDIA, hidden_size=32),
    Family("wav2vec2", "Wav2Vec2ForCTC", ENCODER, "wav2vec2.encoder.layers.{0,1}.attention",
           {**IDS, **SIZES, "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 8],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
           tensors(input_values=(2, 200))),
    audio("whisper", "WhisperForConditionalGeneration", BART_LAYERS, tensors(input_features=(2, 8, 16)), **BART,
          num_mel_bins=8, max_source_positions=8, max_target_positions=32, suppress_tokens=None,
          begin_suppress_tokens=None),

    Family("clip", "CLIPModel", DUAL, "text_model.encoder.layers.{0,1}.self_attn",
           {"text_config": MHA, "vision_config": VISION, "projection_dim": 16}, prompt(pixel_values=(2, 3, 8, 8))),
    Family("siglip", "SiglipModel", DUAL, "text_model.encoder.layers.{0,1}.self_attn",
           {"text_config": MHA, "vision_config": VISION}, prompt(pixel_values=(2, 3, 8, 8))),
    Family("vit", "ViTForImageClassification", ENCODER, "vit.layers.{0,1}.attention", VISION,
           tensors(pixel_values=(2, 3, 8, 8))),

    tower("chinese_clip", "ChineseCLIPVisionModel", "encoder.layers.{0,1}.self_attn",
          tensors(pixel_values=(2, 3, 8, 8)), VISION),
    tower("idefics3", "Idefics3VisionTransformer", "encoder.layers.{0,1}.self_attn",
          tensors(pixel_values=(2, 3, 8, 8)), VISION),
    tower("internvl", "InternVLVisionModel", "encoder.layer.{0,1}.attention", tensors(pixel_values=(2, 3, 8, 8)),
          VISION, image_size=(8, 8), patch_size=(4, 4)),
    tower("qwen2_audio", "Qwen2AudioEncoder", "layers.{0,1}.self_attn", tensors(input_features=(2, 8, 16)),
          WHISPER_ENCODER),
    tower("siglip", "SiglipForImageClassification", "vision_model.encoder.layers.{0,1}.self_attn",
          tensors(pixel_values=(2, 3, 8, 8)), {}, text_config=MHA, vision_config=VISION),
    tower("videomae", "VideoMAEModel", "encoder.layer.{0,1}.attention.attention",
          tensors(pixel_values=(2, 2, 3, 8, 8)), VISION, num_frames=2),
)
# fmt: on

# Parts of the error messages.
NO_ATTENTION = "is an attention module"  # nothing in the model is
NO_INTERFACE = "does not compute its attention through transformers' attention interface"
BY_NAME = "behaves differently depending on the attention implementation's name"
ARGUMENTS = "takes ['{}'], which HiFICL does not know"


def refused(
    name: str,
    model: str,
    attention: str | None = None,
    why: str = NO_INTERFACE,
    base: Config = MHA,
    inputs: Callable[[], Inputs] | None = None,
    **config: Any,
) -> Refused:
    """``attention``: the class that is named; None: there is no attention to name."""
    reason = f"{attention} {why}" if attention else NO_ATTENTION
    return Refused(name, model, reason, {**base, **config}, inputs or prompt())


# fmt: off
REFUSED: tuple[Refused, ...] = (
    refused("big_bird", "BigBirdForMaskedLM", "BigBirdAttention", attention_type="original_full"),
    refused("bloom", "BloomForCausalLM", "BloomAttention", base=GPT2, hidden_size=32),
    refused("codegen", "CodeGenForCausalLM", "CodeGenAttention", base=GPT2, rotary_dim=4),
    refused("deberta", "DebertaForMaskedLM", "DebertaAttention"),
    refused("deberta_v2", "DebertaV2ForMaskedLM", "DebertaV2Attention"),
    refused("deepseek_v32", "DeepseekV32ForCausalLM", "DeepseekV32Attention", BY_NAME, MLA, **ROUTED),
    refused("falcon", "FalconForCausalLM", "FalconAttention"),
    refused("falcon_mamba", "FalconMambaForCausalLM"),
    refused("fnet", "FNetForMaskedLM", inputs=lambda: {"input_ids": prompt()()["input_ids"]}),
    refused("fsmt", "FSMTForConditionalGeneration", "Attention", base=BART, src_vocab_size=VOCABULARY,
            tgt_vocab_size=VOCABULARY, langs=["en", "de"]),
    refused("git", "GitForCausalLM", "GitAttention", vision_config=VISION),
    refused("glm_moe_dsa", "GlmMoeDsaForCausalLM", "GlmMoeDsaAttention", BY_NAME, MLA, **ROUTED),
    refused("gpt_neo", "GPTNeoForCausalLM", "GPTNeoAttention", base=IDS, hidden_size=32, num_layers=2, num_heads=4,
            max_position_embeddings=64, attention_types=[[["global", "local"], 1]]),
    refused("gptj", "GPTJForCausalLM", "GPTJAttention", base=GPT2, rotary_dim=4),
    refused("inkling2", "Inkling2ForCausalLM", "Inkling2SlidingAttention", ARGUMENTS.format("sinks"), WIDE,
            swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, n_routed_experts=4, rel_extent=8,
            num_experts_per_tok=2, moe_intermediate_size=16),
    refused("led", "LEDForConditionalGeneration", "LEDDecoderAttention", base=BART, attention_window=4),
    refused("longformer", "LongformerForMaskedLM", "LongformerAttention", attention_window=4),
    refused("mamba", "MambaForCausalLM"),
    refused("mamba2", "Mamba2ForCausalLM", num_heads=4, head_dim=16, n_groups=1, state_size=8, chunk_size=4),
    refused("megatron_bert", "MegatronBertForMaskedLM", "MegatronBertAttention"),
    refused("minimax_m3_vl", "MiniMaxM3VLForCausalLM", "MiniMaxM3VLAttention", BY_NAME, WIDE, **LOCAL_EXPERTS,
            dense_intermediate_size=48, shared_intermediate_size=16),
    refused("mpnet", "MPNetForMaskedLM", "MPNetAttention"),
    refused("mpt", "MptForCausalLM", "MptAttention", base=IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    refused("mvp", "MvpForConditionalGeneration", "MvpAttention", base=BART),
    refused("openai", "OpenAIGPTLMHeadModel", "Attention", base=GPT2),
    refused("prophetnet", "ProphetNetForConditionalGeneration", "ProphetNetNgramSelfAttention", base=IDS,
            hidden_size=32, **{f"num_{side}_{what}": n for side in ("encoder", "decoder")
                               for what, n in (("layers", 2), ("attention_heads", 4))}),
    refused("rembert", "RemBertForMaskedLM", "RemBertAttention", input_embedding_size=16, output_embedding_size=16),
    refused("roformer", "RoFormerForMaskedLM", "RoFormerAttention"),
    refused("rwkv", "RwkvForCausalLM", "RwkvSelfAttention"),
    refused("trocr", "TrOCRForCausalLM", "TrOCRAttention", base=BART),
    refused("xglm", "XGLMForCausalLM", "XGLMAttention", base=IDS, d_model=32, num_layers=2, attention_heads=4,
            ffn_dim=48),
    refused("xlm", "XLMWithLMHeadModel", "MultiHeadAttention", base=IDS, emb_dim=32, n_layers=2, n_heads=4),
    refused("xlnet", "XLNetLMHeadModel", "XLNetRelativeAttention", base=IDS, d_model=32, n_layer=2, n_head=4,
            d_inner=48),
)
# fmt: on

if Version(transformers.__version__) >= Version("5.24"):
    # Two more dispatch, and Llama 4 fails on images, with an adapter or without.
    FAMILIES = (
        *(family for family in FAMILIES if family.model != "Llama4ForConditionalGeneration"),
        decoder("codegen", "CodeGenForCausalLM", GPT_LAYERS, GPT2, rotary_dim=4),
        decoder("gptj", "GPTJForCausalLM", GPT_LAYERS, GPT2, rotary_dim=4),
    )
    REFUSED = tuple(entry for entry in REFUSED if entry.name not in ("codegen", "gptj"))


# -- the documentation ------------------------------------------------------------------------------------------------

PREAMBLE = """# Architectures

Written by `python -m tests.architectures` with transformers {version}: do not edit. `tests/test_architectures.py`
checks every line on a tiny random model: that exactly the modules named here are adapted by default, that each of them
computes softmax attention over the virtual pairs and the context (against a float64 oracle, under each attention
implementation marked ✓), that greedy generation gives the same with and without a cache, and that an adapter that was
saved and loaded, or disabled, is bit-equal.

{families} architectures are adapted, {refused} are refused. `{{0,1}}` stands for the layers of the tiny model. An
attention implementation without a mark is one that transformers does not offer for the model; ✗ and the notes tell what
the base model itself does not do. An architecture that is not listed may well work: what decides is that its attention
dispatches through transformers' attention interface; one that does not is refused when an adapter is attached.
[Flash attention packages](how-it-works.md#flash-attention-packages) have no column: no model here was run with one.
"""


def document() -> str:
    """The text of docs/architectures.md."""
    lines = [PREAMBLE.format(version=transformers.__version__, families=len(FAMILIES), refused=len(REFUSED))]
    for kind in dict.fromkeys(family.kind for family in FAMILIES):
        lines += [
            f"## {kind}\n",
            f"| Family | Class | Adapted by default | {' | '.join(IMPLEMENTATIONS)} | Checked with | Notes |",
            "|---|---|---|" + ":-:|" * len(IMPLEMENTATIONS) + "---|---|",
            *(_row(family) for family in FAMILIES if family.kind == kind),
            "",
        ]
    lines += ["## Refused\n", "| Family | Class | Reason |", "|---|---|---|"]
    lines += [f"| {r.name} | `{r.model}` | {r.why} |" for r in REFUSED]
    return "\n".join(lines) + "\n"


def _row(family: Family) -> str:
    model = build(family)
    marks = [" " if not offers(model, i) else "✗" if i in family.quirks else "✓" for i in IMPLEMENTATIONS]
    notes = "; ".join(f"{what}: {why}" for what, why in family.quirks.items())
    return f"| {family.name} | `{family.model}` | `{family.targets}` | {' | '.join(marks)} | {family.media} | {notes} |"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    DOCUMENT.write_text(document(), encoding="utf-8")
