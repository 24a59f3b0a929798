"""HiFICL in lmms-eval: `--model hificl_NAME --model_args peft=ADAPTER,...` for its chat model NAME and options of that.

`pip install ./integrations/lmms_eval` registers these by the entry point `lmms_eval.models`.
"""

from lmms_eval.models.registry_v2 import ModelManifest
from peft import PeftModel

import peft_hificl  # noqa: F401  # lets PEFT load the adapter


def manifests():
    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS  # noqa: PLC0415  # it is importing this file

    return [
        ModelManifest(model_id=f"hificl_{name}", chat_class_path=f"hificl_lmms_eval.{name}")
        for name in AVAILABLE_CHAT_TEMPLATE_MODELS
    ]


def __getattr__(name):
    """lmms-eval's class of a chat model, with an adapter on what it has loaded."""
    from lmms_eval.models import get_model, list_available_models  # noqa: PLC0415

    if f"hificl_{name}" not in list_available_models():
        raise AttributeError(name)

    class Adapted(get_model(name)):
        def __init__(self, peft, **kwargs):
            super().__init__(**kwargs)
            self._model = PeftModel.from_pretrained(self.model, peft).eval()

    return Adapted
