"""The package's imports run one way, and its maths knows torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import peft_hificl

ROOT = Path(peft_hificl.__file__).parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """The modules of the package that a module imports, for types too, and the packages outside."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            folder = module.split(".")[: -node.level]
            start = ".".join([*folder, *([node.module] if node.module else [])])
            names = {f"{start}.{alias.name}".lstrip(".") for alias in node.names} & MODULES.keys()
            inside |= names or {start}
    return inside, outside


def test_imports_run_one_way() -> None:
    order = list(TopologicalSorter({module: imports_of(module)[0] for module in MODULES}).static_order())
    assert order.index("__init__") > order.index("model") > order.index("ops.formula")


def test_the_maths_imports_torch_alone() -> None:
    for module in MODULES:
        if module.startswith("ops."):
            inside, outside = imports_of(module)
            assert all(name.startswith("ops.") for name in inside)
            assert outside <= {
                "__future__",
                "collections",
                "contextlib",
                "inspect",
                "itertools",
                "logging",
                "torch",
                "typing",
            }


WITHOUT_DISTRIBUTED = """
import sys, torch
torch.distributed.is_available = lambda: False
import transformers
from peft import PeftModel, get_peft_model
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
))
del torch.distributed.is_initialized
sys.modules |= dict.fromkeys(["torch.distributed.fsdp", "torch.distributed.tensor"])

from peft_hificl import HiFICLConfig, hotswap_adapter
model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2))
ids = torch.tensor([[1, 2, 3]])
model(input_ids=ids, labels=ids).loss.backward()
model.save_pretrained(sys.argv[1])
hotswap_adapter(PeftModel.from_pretrained(model.unload(), sys.argv[1]), sys.argv[1], "default")
print("done")
"""


def test_torch_may_be_built_without_distributed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_DISTRIBUTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
