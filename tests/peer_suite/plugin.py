"""The pytest plugin that puts `HiFICLConfig` where PEFT's tests are parametrised by all of PEFT's methods."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from peft_hificl import HiFICLConfig

from . import attention_models
from .models import MORE_DECODERS

PACKAGE = "peft_tests"
CUSTOM = [  # as in PEFT's TEST_CASES: name, model, class, configuration
    ("one", "MLP", HiFICLConfig, {"target_modules": ["lin0"]}),
    ("two", "MLP", HiFICLConfig, {"target_modules": ["lin0", "lin2"]}),
    ("saved", "MLP", HiFICLConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
]

# What HiFICL refuses: a part of the test's name, the error, and why. The first that applies holds.
REFUSED = [
    ("GPTJ", ValueError, "its attention does not go through transformers' attention interface"),
    ("Deberta", ValueError, "its attention does not go through transformers' attention interface"),
    ("merg", NotImplementedError, "virtual pairs add columns to the softmax, which no change of weights can express"),
    ("test_forward_float16", NotImplementedError, "merges at its end"),
    ("test_forward_bfloat16", NotImplementedError, "merges at its end"),
    ("test_set_adapter_non_overlapping_modules", AttributeError, "reads the adapters off the target module itself"),
    ("test_set_requires_grad[", AttributeError, "reads the adapters off the target module itself"),
]


def pytest_configure() -> None:
    """Patch PEFT's helpers before its test modules take them from there by name, and then the modules."""
    pytest.register_assert_rewrite(PACKAGE)
    utilities = importlib.import_module(f"{PACKAGE}.testing_utils")
    utilities.hub_online_once = contextlib.nullcontext  # every model is on the disk
    with pytest.MonkeyPatch.context() as patch:
        # Imported at the top of a module, for tests that are not run here.
        pipeline = type("StableDiffusionPipeline", (), {})
        patch.setitem(sys.modules, "diffusers", SimpleNamespace(StableDiffusionPipeline=pipeline))
        common = importlib.import_module(f"{PACKAGE}.testing_common")
    common._skip_if_conv1d_not_supported = lambda *_: None  # what is adapted is not GPT-2's projections
    decoders = importlib.import_module(f"{PACKAGE}.test_decoder_models")
    decoders._skip_if_not_conv1d_supported = lambda *_: None
    decoders.check_beft_config = lambda *_: None  # skips Llama and Gemma, and means another method
    decoders.PEFT_DECODER_MODELS_TO_TEST.extend(MORE_DECODERS)
    custom = importlib.import_module(f"{PACKAGE}.test_custom_models")
    custom.MLP, custom.DeepMLP = attention_models.MLP, attention_models.DeepMLP


IDENTITY = {"init_weights": "identity", "scale_self_attention": False}  # bit by bit


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    exact = metafunc.function.__name__ == "test_disable_adapters"  # demands that a fresh adapter change nothing
    rows = [(*row, arguments | IDENTITY) if exact else (*row, arguments) for *row, arguments in CUSTOM]
    marks = metafunc.definition.own_markers
    for place, mark in enumerate(marks):
        if mark.name == "parametrize":
            names, values, *_ = mark.args
            marks[place] = pytest.mark.parametrize(names, replaced(names, list(values), rows), **mark.kwargs).mark


def replaced(names: str, values: list[Any], custom: list[Any]) -> list[Any]:
    """HiFICL in the place of a list of PEFT's methods; what is no such list, or one of a few methods, stays."""
    match names.replace(" ", "").split(","):
        case ["config_cls"] | ["config_class"]:
            classes, least, ours = values, 8, [HiFICLConfig]
        case ["config_class", "mandatory_kwargs"]:
            classes, least, ours = [row[0] for row in values], 8, [(HiFICLConfig, {})]
        case ["config_cls", "config_kwargs"]:
            task = values[0][1].get("task_type")
            classes, least, ours = [row[0] for row in values], 4, [(HiFICLConfig, {"task_type": task})]
        case ["test_name", "model_id", "config_cls", "config_kwargs"]:
            classes, least, ours = [row[2] for row in values], 4, custom
        case _:
            return values
    return ours if LoraConfig in classes and len(set(classes)) >= least else values


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what runs on HiFICL, and expect what it refuses to be refused."""
    kept, others = [], []
    for item in items:
        of_hificl = hasattr(item, "callspec") and HiFICLConfig in item.callspec.params.values()
        (kept if of_hificl else others).append(item)
        for part, error, reason in REFUSED:
            if part in item.name:
                item.add_marker(pytest.mark.xfail(raises=error, reason=reason, strict=True))
                break
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.fixture(autouse=True)
def prepared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if "mixed_adapter_batches" in request.node.name:  # skipped for all methods but LoRA
        for module in (request.module, sys.modules[f"{PACKAGE}.testing_common"]):
            monkeypatch.setattr(module, "LoraConfig", HiFICLConfig)
