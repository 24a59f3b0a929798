"""HiFICL (arXiv 2603.12760) as a PEFT method: learned virtual key-value pairs in every attention head.

Importing the package registers the method with PEFT.  From then on `get_peft_model(model, HiFICLConfig())`,
`PeftModel.from_pretrained(...)` and the rest of PEFT work as they do for LoRA.
"""

from .registration import add_peft_type, register, register_key_renaming

add_peft_type()  # before the imports below, whose classes refer to PeftType.HIFICL

from .balancing import balance_factors  # noqa: E402
from .config import HiFICLConfig  # noqa: E402
from .demonstrations import initialize_from_demonstrations  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .layer import HiFICLLayer  # noqa: E402
from .model import HiFICLModel  # noqa: E402
from .model_card import keep_usage  # noqa: E402
from .moved import keep_paths  # noqa: E402
from .ops.formula import (  # noqa: E402
    Scoring,
    VirtualPairs,
    concatenate_pairs,
    select_rows,
    virtual_attention,
)
from .optimizer import parameter_groups  # noqa: E402
from .prefix import to_prefix_cache, to_prefix_tuning  # noqa: E402
from .pruning import prune_pairs  # noqa: E402
from .strength import rescale_adapter_scale  # noqa: E402

register(HiFICLConfig, HiFICLModel)
register_key_renaming()
keep_usage()
keep_paths(__name__)

__version__ = "0.1.0"
__all__ = [
    "HiFICLConfig",
    "HiFICLLayer",
    "HiFICLModel",
    "Scoring",
    "VirtualPairs",
    "balance_factors",
    "concatenate_pairs",
    "hotswap_adapter",
    "initialize_from_demonstrations",
    "parameter_groups",
    "prune_pairs",
    "rescale_adapter_scale",
    "select_rows",
    "to_prefix_cache",
    "to_prefix_tuning",
    "virtual_attention",
]
