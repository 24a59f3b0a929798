"""What PEFT and transformers test for LoRA by name, in files that the suite leaves out."""

import torch
from peft import PeftModel, get_layer_status, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

from peft_hificl import HiFICLConfig

from .models import LLAMA, tokenizer

IDS = torch.arange(5, 12)[None]


def adapted() -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    return get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", init_weights=False))


def test_the_status_of_a_model_and_of_its_layers():
    model = adapted()
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["default"])
    assert (status.peft_types, status.requires_grad) == ({"default": "HIFICL"}, {"default": True})
    assert status.devices == {"default": ["cpu"]}
    layers = get_layer_status(model)
    assert len(layers) == status.num_adapter_layers == LLAMA["num_hidden_layers"]
    assert not any(layer.merged_adapters for layer in layers)


@torch.no_grad()
def test_input_casting_switched_off_changes_nothing():
    model = adapted()
    expected = model(input_ids=IDS).logits
    with disable_input_dtype_casting(model):
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_pipeline_takes_the_folder_of_an_adapter(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(base)
    tokenizer().save_pretrained(base)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base).eval(), HiFICLConfig(task_type="CAUSAL_LM", init_weights=False)
    )
    model.save_pretrained(str(adapter))
    prompt, greedily = "w7 w8 w9", {"max_new_tokens": 8, "do_sample": False}
    generate = pipeline("text-generation", model=str(adapter), device="cpu")
    (answer,) = generate(prompt, **greedily)

    def said(model):
        ids = model.generate(**tokenizer()(prompt, return_tensors="pt"), **greedily)
        return tokenizer().decode(ids[0], skip_special_tokens=True).replace(" ", "")

    with model.disable_adapter():
        without = said(model)
    assert answer["generated_text"].replace(" ", "") == said(model) != without
