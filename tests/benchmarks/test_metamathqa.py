"""The entry for PEFT's comparison loads as PEFT's script loads it, and has the size that is stated."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from peft_hificl import HiFICLConfig

FOLDER = Path(__file__).parents[2] / "benchmarks" / "metamathqa"
EXPERIMENT = FOLDER / "experiments" / "hificl" / "llama-3.2-3B-n8-r8"


def test_the_configuration_is_hificls_and_of_the_stated_size():
    config = PeftConfig.from_pretrained(EXPERIMENT)
    assert isinstance(config, HiFICLConfig) and config.skip_first_token and (config.n, config.r) == (8, 8)
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(shape), config)
    trained, total = model.get_nb_trainable_parameters()
    assert f"{trained:,} parameters" in (FOLDER / "README.md").read_text()
    assert 3.2e9 < total < 3.3e9


def test_it_trains_and_generates_as_the_comparison_does():
    """One step in bfloat16 with the adapter in float32; then a static cache and prompts that are padded on the left."""
    training = json.loads((EXPERIMENT / "training_params.json").read_text())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, eos_token_id=None, **sizes))
    model = get_peft_model(base.to(torch.bfloat16), PeftConfig.from_pretrained(EXPERIMENT))
    ids, mask = torch.randint(1, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    optimizer = torch.optim.AdamW(model.parameters(), **training["optimizer_kwargs"])
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model(input_ids=ids, attention_mask=mask, labels=ids, num_items_in_batch=mask.sum().item()).loss.backward()
    optimizer.step()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True)
    )
    how = GenerationConfig(cache_implementation="static", max_length=14, pad_token_id=0, do_sample=False)
    with torch.inference_mode():
        found = model.eval().generate(input_ids=ids, attention_mask=mask, generation_config=how)
        alone = model.generate(input_ids=ids[:1, 3:], max_new_tokens=5, pad_token_id=0, do_sample=False)
    assert found.shape == (2, 14) and found[0, 9] == alone[0, 6]
