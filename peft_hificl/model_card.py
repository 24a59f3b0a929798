"""The usage section of a saved adapter's model card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import HiFICLConfig


def add_usage(save_directory: str, config: HiFICLConfig) -> None:
    """Add how to load the adapter to the card that PEFT has written beside it (or above, for a named adapter).

    Loading needs `import peft_hificl`, which nothing in PEFT's own card says.  The section of an adapter that was
    saved in the same place before is replaced.  A README that is not a PEFT card is left alone.
    """
    folder = Path(save_directory)
    for path, adapter in ((folder / "README.md", "."), (folder.parent / "README.md", folder.name)):
        if path.is_file():
            card = path.read_text(encoding="utf-8")
            if "library_name: peft" in card:
                begin, end = (f"<!-- peft-hificl: {edge} of the usage of {adapter} -->" for edge in ("begin", "end"))
                section = f"{begin}\n{_usage(config, adapter)}{end}"
                before, found, rest = card.partition(begin)
                card = f"{before}{section}{rest.partition(end)[2]}" if found else f"{card.rstrip()}\n\n{section}\n"
                path.write_text(card, encoding="utf-8")
            return


def _usage(config: HiFICLConfig, adapter: str) -> str:
    heading = "## How to use this HiFICL adapter" if adapter == "." else f"## How to use the HiFICL adapter {adapter}"
    base_class = config._base_model_class or "AutoModel"
    base = config.base_model_name_or_path
    if base is None:
        base = "the base model: a folder or its id on the Hub"
    elif os.path.isdir(base):
        base = os.path.abspath(base)  # the snippet runs in the adapter's folder
    return f"""{heading}

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
