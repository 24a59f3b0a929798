"""How the API reference reads docstrings."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class PeftStyle(Extension):
    """They are written as PEFT's are: a parameter's type in backticks, and [`Name`] for another object."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"\(\[?`~?([^`]+)`\]?\):", r"(\1):", obj.docstring.value)
            obj.docstring.value = re.sub(r"\[`(\w+)`\]", r"[`\1`][peft_hificl.\1]", text)
