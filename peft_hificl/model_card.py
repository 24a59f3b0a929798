"""The usage section of a saved adapter's model card."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import HiFICLConfig

HEADING = "## How to use this HiFICL adapter"


def add_usage(save_directory: str, config: HiFICLConfig) -> None:
    """Add how to load the adapter to the card that PEFT has written beside it (or above, for a named adapter).

    Loading needs `import peft_hificl`, which nothing in PEFT's own card says.  A README that is not a PEFT card is
    left alone.
    """
    folder = Path(save_directory)
    for path, adapter in ((folder / "README.md", "."), (folder.parent / "README.md", folder.name)):
        if path.is_file():
            card = path.read_text(encoding="utf-8")
            if "library_name: peft" in card:
                # A section of an adapter that was saved here before ends at the next heading.
                others = re.sub(rf"\n*{HEADING}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
                path.write_text(f"{others.rstrip()}\n\n{_usage(config, adapter)}", encoding="utf-8")
            return


def _usage(config: HiFICLConfig, adapter: str) -> str:
    base_class = config._base_model_class or "AutoModel"
    base = config.base_model_name_or_path
    if base is not None and os.path.isdir(base):
        base = os.path.abspath(base)  # the snippet runs in the adapter's folder
    return f"""{HEADING}

{config.n} virtual key-value pairs per attention head, rank {config.r} ([HiFICL](https://arxiv.org/abs/2603.12760)).

```bash
pip install peft-hificl
```

```python
import peft_hificl  # registers HiFICL with PEFT; without it, loading fails with KeyError: 'HIFICL'
from peft import PeftModel
from transformers import {base_class}

base = {base_class}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "{adapter}")  # this folder, or its id on the Hub
```
"""
