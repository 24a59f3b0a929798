"""`python -m benchmarks.scale`: see the package's docstring."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from math import gcd
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.progress import track
from transformers import LlamaConfig, PreTrainedModel

from peft_hificl import HiFICLConfig

from ..common import files
from ..common.environment import command, environment, prepare
from ..common.tables import Record, Table, bytes_of, count
from ..quality.methods.learner import trainable
from ..speed.checkpoints import without_weights
from ..speed.measure import flops
from . import __doc__ as what_it_does

RESULTS = Path(__file__).parents[1] / "results" / "scale"
N, R, LORA_R = 8, 8, 16
TOKENS = 2048  # of a training row
CONTEXT = 4096  # that a new token sees
DEVICES, ADAPTERS = (1, 8, 64, 1024), (1, 100, 10_000)
HALF, STATE = 2, 16  # bytes: of a weight in bfloat16; of a trained one in float32, its gradient, AdamW's two moments


def _llama(hidden: int, layers: int, heads: int, groups: int, intermediate: int, words: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=intermediate, vocab_size=words,
    )  # fmt: skip


MODELS: dict[str, Callable[[], LlamaConfig]] = {
    "7B (Llama 2)": partial(_llama, 4096, 32, 32, 32, 11008, 32000),
    "70B (Llama 3)": partial(_llama, 8192, 80, 64, 8, 28672, 128256),
    "405B (Llama 3.1)": partial(_llama, 16384, 126, 128, 8, 53248, 128256),
}
METHODS: dict[str, Callable[[], PeftConfig]] = {
    f"HiFICL, n = {N}, r = {R}": lambda: HiFICLConfig(task_type="CAUSAL_LM", n=N, r=R),
    f"LoRA on q, k, v, o, r = {LORA_R}": lambda: LoraConfig(
        task_type="CAUSAL_LM", r=LORA_R, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    ),
}


def compute(name: str) -> Record:
    """What is counted of a base model and of each method on it."""
    config = MODELS[name]()
    base = without_weights(config)
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    weights = sum(parameter.numel() for parameter in base.parameters())
    read = weights - base.get_input_embeddings().weight.numel()  # a token reads one row of the embeddings
    head_dim = config.hidden_size // config.num_attention_heads
    pairs = config.num_hidden_layers * config.num_attention_heads * N * 2 * head_dim  # numbers in K_D and V_D
    methods = {}
    for title, attach in METHODS.items():
        with torch.device("meta"):
            model = get_peft_model(without_weights(config), attach())
        parameters = sum(parameter.numel() for parameter in trainable(model))
        is_hificl = title.startswith("HiFICL")
        methods[title] = {
            "parameters": parameters,
            "step": flops(partial(_step, model, ids)),
            # A row of a decoding step: scores and mixing of the pairs, or the products with A and B.
            "token": 2 * (pairs if is_hificl else parameters),
            # Once a forward for each adapter that a batch has: K_A K_B and V_A V_B.
            "adapter": 2 * R * pairs if is_hificl else 0,
        }
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * 2 * head_dim * CONTEXT
    return {
        "model": name,
        "weights": weights,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "groups": config.num_key_value_heads,
        "step": flops(partial(_frozen, base, ids)),
        "token": 2 * read + attention,
        "methods": methods,
    }


def _step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def _frozen(base: PreTrainedModel, ids: torch.Tensor) -> None:
    """Forward and backward through a base model of which nothing is trained, as an adapter in the first layer needs."""
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    base(inputs_embeds=embedded, labels=ids).loss.backward()


def tables(records: list[Record]) -> list[Table]:
    each = [(record, title, of) for record in records for title, of in record["methods"].items()]
    adapters = Table(
        "An adapter",
        ("model", "method", "parameters", "file, bfloat16", "adapters in a GiB", "memory of 10,000", "of the base"),
        [
            [
                record["model"], title, count(of["parameters"]), bytes_of(HALF * of["parameters"]),
                f"{2**30 / (HALF * of['parameters']):.1f}", bytes_of(10_000 * HALF * of["parameters"]),
                f"{of['parameters'] / record['weights']:.4%}",
            ]
            for record, title, of in each
        ],
    )  # fmt: skip
    training = Table(
        f"Training on a row of {TOKENS} tokens",
        ("model", "method", "FLOPs, frozen base", "FLOPs", "state", *(f"reduced, {d} devices" for d in DEVICES[1:])),
        [
            [
                record["model"], title, f"{record['step']:.3e}", f"{of['step']:.3e}",
                bytes_of(STATE * of["parameters"]),
                *(bytes_of(2 * (d - 1) / d * 4 * of["parameters"]) for d in DEVICES[1:]),
            ]
            for record, title, of in each
        ],
    )  # fmt: skip
    sharded = Table(
        "The base's weights in bfloat16, sharded over so many devices, and what one receives of them in a step",
        ("model", *(f"on {d}" for d in DEVICES), "received, at most", "ranks of tensor parallelism"),
        [
            [
                record["model"], *(bytes_of(HALF * record["weights"] / d) for d in DEVICES),
                bytes_of(2 * HALF * record["weights"]),
                ", ".join(str(d) for d in range(1, 129) if gcd(record["heads"], record["groups"]) % d == 0),
            ]
            for record in records
        ],
    )  # fmt: skip
    serving = Table(
        f"A new token behind {CONTEXT}, in a batch of 64 rows with as many adapters of one base",
        ("model", "method", "FLOPs of the base", "added, 1 adapter", "added, 64", "bytes read, of the base's"),
        [
            [
                record["model"], title, f"{record['token']:.3g}",
                *(f"{(of['token'] + a * of['adapter'] / 64) / record['token']:.3%}" for a in (1, 64)),
                f"{64 * of['parameters'] / record['weights']:.2%}",
            ]
            for record, title, of in each
        ],
    )  # fmt: skip
    server = Table(
        "Weights of a base and of so many adapters in one server, bfloat16",
        ("model", "method", *(f"{a:,}" for a in ADAPTERS)),
        [
            [record["model"], title, *(bytes_of(HALF * (record["weights"] + a * of["parameters"])) for a in ADAPTERS)]
            for record, title, of in each
        ],
    )
    return [adapters, training, sharded, serving, server]


METHOD = """**Computed, not measured**, by `python -m benchmarks.scale`: Llama shapes on the meta device, adapters
attached by PEFT, training FLOPs by `torch.utils.flop_counter`.

- frozen base: forward, and backward through every layer. A step with HiFICL needs no gradient of what comes before the
  first pairs, so it can have fewer FLOPs than that.
- state: adapter, its gradient and AdamW's two moments in float32, on each device that holds a whole adapter.
- reduced: bytes that a device sends in a step of data parallelism, 2 (D - 1) / D times the gradients in float32.
- received: with FSDP2 or ZeRO-3, each weight is gathered once in the forward and once in the backward.
- ranks of tensor parallelism: numbers that divide query and key/value heads, as HiFICL needs; each rank has the pairs
  of its heads, and nothing of an adapter is sent.
- a new token: 2 FLOPs for each weight that it meets, and attention over the context. HiFICL adds the scores and the
  mixing of n pairs to each row, and K_A K_B, V_A V_B once a forward to each adapter of the batch; LoRA the products
  with A and B. Neither is merged. The last column says how many bytes of adapters a step reads for each byte of
  weights that it reads anyway, with an adapter of its own for each of the 64 rows; keys and values of the context,
  which are the same for both, are left out."""


def write(results: Path) -> Path:
    records = [compute(name) for name in track(MODELS, "models")]
    files.write(results / "scale.json", {"command": command(), **environment(), "records": records})
    lines = ["# Scale on paper", "", METHOD]
    for table in tables(records):
        lines += ["", *table.markdown()]
    path = results / "scale.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    prepare()
    print(write(args.results))


if __name__ == "__main__":
    main()
