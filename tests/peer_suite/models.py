"""Tiny random models in folders whose relative paths are the names that PEFT's tests load models by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

VOCABULARY = 128
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4}
# Weights far from zero, so that what an adapter changes is seen in the output.
LLAMA = TOKENS | {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
GPT2 = TOKENS | {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "initializer_range": 0.2}
OPT = TOKENS | {
    "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "init_std": 0.2,
}  # fmt: skip
BERT = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 4, "decoder_start_token_id": 0, "d_model": 32,
    "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
}  # fmt: skip
BART = TOKENS | {
    "decoder_start_token_id": 3, "forced_eos_token_id": None, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 128, "init_std": 0.2,
}  # fmt: skip
SLIDING = LLAMA | {"head_dim": 16, "sliding_window": 16}
UNTIED = SLIDING | {"tie_word_embeddings": False}

Model = Callable[[], tf.PreTrainedModel]
DECODERS: dict[str, Model] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "peft-internal-testing/opt-125m": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(**GPT2, rotary_dim=4)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**UNTIED)),
}
# PEFT's tests of decoders run on these, too.
MORE_DECODERS: dict[str, Model] = {
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SLIDING)),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=16)),
    "more/llama-mha": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA | {"num_key_value_heads": 4})),
    "more/gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**UNTIED)),
    "more/phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLAMA | {"num_key_value_heads": 4})),
    "more/gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TOKENS | BERT)),
}
OTHERS: dict[str, Model] = {
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5)
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(**BART)
    ),
    "peft-internal-testing/tiny-random-BertModel": lambda: tf.BertModel(tf.BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(**BERT)
    ),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: tf.RobertaModel(tf.RobertaConfig(**TOKENS | BERT)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**TOKENS | BERT)
    ),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: tf.DebertaModel(tf.DebertaConfig(**BERT)),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**BERT)),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**LLAMA, num_labels=1)
    ),
}


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """A word for each id."""
    words = ["<pad>", "w1", "w2", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(6, VOCABULARY))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build(folder: Path) -> Path:
    """Write every model that is not there yet, with a tokenizer, and the one adapter that PEFT's tests load."""
    for seed, (name, make) in enumerate((DECODERS | MORE_DECODERS | OTHERS).items()):
        if not (folder / name / "tokenizer.json").exists():
            torch.manual_seed(seed)
            make().eval().save_pretrained(folder / name)
            tokenizer().save_pretrained(folder / name)
    adapter = LoraConfig(base_model_name_or_path=next(iter(DECODERS)), task_type="CAUSAL_LM")
    adapter.save_pretrained(str(folder / "peft-internal-testing/tiny-opt-lora-revision"))
    return folder
