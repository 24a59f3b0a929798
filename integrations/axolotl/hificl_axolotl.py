"""HiFICL in Axolotl: `adapter: hificl`, by the plugin `hificl_axolotl.HiFICLPlugin` (see `hificl.yaml`).

The folder of this file has to be on PYTHONPATH.
"""

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from peft_hificl import HiFICLConfig


class HiFICLArgs(BaseModel):
    hificl: dict = {}  # the fields of HiFICLConfig


class HiFICLPlugin(BasePlugin):
    def get_input_args(self):
        return "hificl_axolotl.HiFICLArgs"

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name="hificl")]

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        if cfg.adapter != "hificl":
            return None
        config = HiFICLConfig(task_type="CAUSAL_LM", **(cfg.hificl or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config
