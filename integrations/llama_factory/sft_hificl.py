"""HiFICL in LLaMA-Factory v1: `python sft_hificl.py hificl.yaml`, or with `torchrun` in the place of `python`.

LLaMA-Factory loads no plugins from elsewhere, so this file registers one and starts its trainer.
"""

from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
from llamafactory.v1.trainers.sft_trainer import run_sft
from peft import PeftModel, get_peft_model

from peft_hificl import HiFICLConfig


@PeftPlugin("hificl").register()
def hificl(model, peft_config, is_train=False):
    fields = {key: value for key, value in peft_config.items() if key != "name"}  # of HiFICLConfig
    folder = fields.pop("adapter_name_or_path", None)
    if folder is not None:
        return PeftModel.from_pretrained(model, folder, is_trainable=is_train)
    return get_peft_model(model, HiFICLConfig(task_type="CAUSAL_LM", **fields))


if __name__ == "__main__":
    run_sft()
