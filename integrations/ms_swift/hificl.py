"""HiFICL as a tuner of ms-swift: `swift sft --external_plugins hificl.py --tuner_type hificl ...`.

Copy this file and set the configuration here: ms-swift's own options (`--lora_rank`, `--target_modules`) are LoRA's.
"""

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from peft_hificl import HiFICLConfig


class HiFICLTuner(PeftTuner):
    @staticmethod
    def prepare_model(args, model):
        return get_peft_model(model, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8, skip_first_token=True))


tuners_map["hificl"] = HiFICLTuner
