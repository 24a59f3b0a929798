"""TRL's own trainers: the reference adapter, packed and padded batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy

from peft_hificl import HiFICLConfig

from ..helpers import VOCAB, build, config, logits, train
from . import reports

pytestmark = pytest.mark.integration

NAMES = ["DPO", "KTO", "GRPO", "RLOO"]
LN_2 = 0.6931471805599453


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """A word for every id of the small models; 0 pads, 1 ends."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


PROMPTS = [text(5, 6, 7), text(8, 9, 10, 11, 12, 13, 14), text(15), text(16, 17, 18, 19)]
GOOD = [text(20, 21), text(22, 23, 24), text(25, 26, 27, 28), text(29)]
BAD = [text(30, 31, 32), text(33), text(34, 35), text(36, 37, 38, 39)]


def going_on(tmp_path: Path, peft_config: Any) -> PeftModel:
    """A trained adapter, stored and loaded to be trained further, as a second stage of training does."""
    torch.manual_seed(1)
    first = get_peft_model(build("gqa"), peft_config)
    train(first, "gqa")
    first.save_pretrained(tmp_path / "first")
    return PeftModel.from_pretrained(build("gqa"), tmp_path / "first", is_trainable=True)


CONFIGS = {
    "factors": lambda: config(task_type="CAUSAL_LM"),
    "whole": lambda: config(task_type="CAUSAL_LM", factorize_keys=False, factorize_values=False),
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False),
}


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    """HiFICL in both its forms; and LoRA, which tells what the trainers themselves do."""
    return request.param


@pytest.fixture
def policy(kind: str, tmp_path: Path) -> PeftModel:
    return going_on(tmp_path, CONFIGS[kind]())


def arguments(folder: Path) -> dict[str, Any]:
    """One step, in full precision, all else as TRL has it by default."""
    return {
        "output_dir": str(folder), "max_steps": 1, "logging_steps": 1, "warmup_steps": 0, "use_cpu": True,
        "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def first_step(name: str, model: Any, folder: Path, peft_config: Any = None) -> tuple[Any, dict[str, float]]:
    """One step of a trainer, and what it logged."""
    columns: dict[str, list[Any]] = {
        "DPO": {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD},
        "KTO": {"prompt": PROMPTS, "completion": GOOD[:2] + BAD[2:], "label": [True, True, False, False]},
    }.get(name, {"prompt": PROMPTS})
    samples, rewarded = {}, {}
    if name in ("GRPO", "RLOO"):
        samples = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1}
        rewarded = {"reward_funcs": lambda completions, **_: [float(len(c) % 3) for c in completions]}
    trainer = trainer_class(name)(
        model=model,
        args=getattr(trl, f"{name}Config")(
            **arguments(folder), per_device_train_batch_size=4, learning_rate=1e-2, **samples
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **rewarded,
    )
    with reports() as found:
        trainer.train()
    assert found == []  # nothing to say about the reference, which is frozen
    return trainer, trainer.state.log_history[0]


class Noting:
    """Notes every computation of log-probabilities that GRPO and RLOO make."""

    noted: list[tuple[Tensor, Tensor, Tensor]]  # ids, mask, log-probabilities

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Tensor, mask: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        out = super()._get_per_token_logps_and_entropies(model, ids, mask, *args, **kwargs)
        self.noted = [*getattr(self, "noted", []), (ids, mask, out[0].detach())]
        return out


def trainer_class(name: str) -> type:
    own = getattr(trl, f"{name}Trainer")  # trl imports it only now, which takes seconds
    return type(name, (Noting, own), {}) if name in ("GRPO", "RLOO") else own


def tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items()}


def check_that_nothing_has_moved_yet(name: str, log: dict[str, float]) -> None:
    """What a trainer logs at its first step where the policy and its reference are the same."""
    match name:
        case "DPO":
            assert log["loss"] == pytest.approx(LN_2, abs=1e-5)
            assert log["rewards/margins"] == pytest.approx(0, abs=1e-5)
        case "KTO":  # its "kl" is clamped at 0, and an average besides
            assert log["loss"] == pytest.approx(0.5, abs=1e-5)
            for key in ("rewards/chosen", "rewards/rejected", "kl"):
                assert log[key] == pytest.approx(0, abs=1e-5), key
        case _:
            assert log["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_an_exact_copy_of_the_adapter(name: str, policy: PeftModel, tmp_path: Path) -> None:
    before = tensors(policy, "default")
    trainer, log = first_step(name, policy, tmp_path)
    check_that_nothing_has_moved_yet(name, log)
    if name == "RLOO":  # its "kl" is an average in which differences could cancel out
        (_, _, own), (_, _, references) = trainer.noted[:2]
        torch.testing.assert_close(own, references, rtol=0, atol=1e-5)
    reference, after = tensors(trainer.model, "ref"), tensors(trainer.model, "default")
    assert before and reference.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(reference[key], tensor), key  # copied, and not trained
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
    assert trainer.model.active_adapters == ["default"]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_is_compared_with_the_base(name: str, tmp_path: Path) -> None:
    """There is no adapter "ref" then.  With alpha = 1 a fresh adapter is the base."""
    fresh = HiFICLConfig(task_type="CAUSAL_LM", n=3, r=2, scale_self_attention=False)
    trainer, log = first_step(name, build("gqa"), tmp_path, peft_config=fresh)
    check_that_nothing_has_moved_yet(name, log)
    assert list(trainer.model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_log_probabilities_of_a_padded_batch_are_those_of_each_sample_alone(
    name: str, policy: PeftModel, tmp_path: Path
) -> None:
    alone = copy.deepcopy(policy).eval()
    trainer, _ = first_step(name, policy, tmp_path)
    ids, mask, batched = trainer.noted[-1]  # the policy's, in the training step
    assert (mask[:, 0] == 0).any()  # padded on the left
    for row in range(len(ids)):
        kept = mask[row].bool()
        sample = ids[row][kept]
        completion = kept[-batched.shape[1] :]  # padded on the right
        want = torch.log_softmax(logits(alone, input_ids=sample[None])[0].float(), dim=-1)
        want = want[:-1].gather(1, sample[1:, None])[:, 0][-int(completion.sum()) :]
        torch.testing.assert_close(batched[row][completion], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("packing", [True, False], ids=["packing", "padding_free"])
def test_packed_rows_train_as_one_by_one(packing: bool, kind: str, tmp_path: Path) -> None:
    """SFTTrainer's loss, and the adapter after a step of plain gradient descent."""
    shape = {"packing": True, "max_length": 10} if packing else {"padding_free": True, "max_length": None}
    torch.manual_seed(1)
    trainer = trl.SFTTrainer(
        model=build("gqa"),
        args=trl.SFTConfig(
            **arguments(tmp_path), per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", max_grad_norm=0.0,
            lr_scheduler_type="constant", **shape,
        ),
        train_dataset=Dataset.from_dict({"text": PROMPTS}),
        processing_class=tokenizer(),
        peft_config=CONFIGS[kind](),
    )  # fmt: skip
    alone = get_peft_model(build("gqa"), CONFIGS[kind]())
    set_peft_model_state_dict(alone, tensors(trainer.model, "default"))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() == len(PROMPTS)
    trainer.train()

    rows = [torch.tensor(tokenizer()(f"{prompt} <eos>")["input_ids"]) for prompt in PROMPTS]
    losses = [
        cross_entropy(alone(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows
    ]  # fmt: skip
    loss = sum(losses) / sum(len(row) - 1 for row in rows)
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        want = alone.get_parameter(name).detach() - 0.1 * gradient
        found = trainer.model.get_parameter(name).detach()
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5, msg=name)
