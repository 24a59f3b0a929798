"""Every row of docs/limits.md: the tests that pin it, and those of limits that PEFT, transformers or torch set."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from .helpers import IMAGE, adapted, build, config, hificl_layers, inputs_for, logits

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "limits.md"

# The beginning of each row of the document, and the tests that pin it; or why no test here can.
ROWS: dict[str, tuple[str, ...] | str] = {
    "A fresh adapter is not the identity": (
        "test_peft_api.py::test_paper_init_is_not_the_identity",
        "test_peft_api.py::test_alpha_one_at_paper_init_is_the_identity",
        "test_first_token.py::test_a_fresh_adapter_answers_as_the_base_does",
    ),
    "A model's attention sink": ("test_first_token.py::test_the_first_token_is_the_base_models",),
    "With skip_first_token=True": ("test_first_token.py::test_the_first_token_is_the_base_models",),
    "It cannot be merged": (
        "test_peft_api.py::test_merging_is_refused_in_one_sentence",
        "test_peft_api.py::test_unload_restores_the_base_model",
        "test_limits.py::test_unload_keeps_whole_modules_but_no_tokens",
    ),
    "Loading needs import peft_hificl": (
        "test_limits.py::test_without_the_import_loading_says_which_name_is_missing",
        "test_peft_api.py::test_the_model_cards_snippet_runs_as_written",
        "test_autoload.py::test_the_launcher_runs_a_script",
        "test_autoload.py::test_autoload_of_the_real_package",
    ),
    "transformers 5.24 asks for PEFT 0.22": "with the versions that tests run on, transformers asks for nothing",
    "HF_HUB_OFFLINE=1 with subfolder": ("test_hub.py::test_revisions_subfolders_and_every_way_to_load_then_offline",),
    "Attention that does not go through": (
        "test_architectures.py::test_refused_with_the_reason",
        "test_bad_input.py::test_models_without_attention_that_dispatches",
    ),
    "Flash attention packages": (
        "test_flash_packages.py::test_values_and_gradients",
        "test_flash_packages.py::test_a_model_computes_what_it_does_in_eager",
    ),
    "A flash attention package whose backward": (
        "test_flash_packages.py::test_a_package_without_what_is_needed_is_named",
        "test_flash_packages.py::test_a_package_without_a_backward_is_refused",
        "test_flash_packages.py::test_a_package_of_one_function",
        "test_flash_packages.py::test_a_package_that_cannot_be_loaded_is_refused",
        "test_attention.py::test_an_unsupported_implementation_is_refused",
    ),
    "A flash attention package whose functions": (
        "test_flash_packages.py::test_a_package_that_returns_no_lse_is_refused",
    ),
    "Under a flash attention package": ("test_flash_packages.py::test_calls_that_packages_would_misread_are_refused",),
    "Continuous batching": (
        "test_continuous_batching.py::test_each_request_is_answered_as_by_generate",
        "test_continuous_batching.py::test_what_is_refused_is_refused_by_the_call",
        "test_continuous_batching.py::test_adapter_names_are_refused_wherever_they_are_given",
        "test_continuous_batching.py::test_flash_attention_is_not_switched_on",
        "test_flash_packages.py::test_continuous_batching_is_refused",
        "test_continuous_batching.py::test_a_model_around_the_adapted_one_does_not_know",
    ),
    "Requests of continuous batching": (
        "test_continuous_batching.py::test_requests_share_the_blocks_that_they_share_without_an_adapter",
        "test_continuous_batching.py::test_each_adapter_finds_its_own_blocks_again",
        "test_continuous_batching.py::test_nothing_is_shared_beside_what_else_was_trained",
        "test_continuous_batching.py::test_nothing_is_shared_where_weights_are_elsewhere",
        "test_continuous_batching.py::test_nothing_is_shared_by_an_older_or_an_unknown_cache",
        "test_continuous_batching.py::test_a_model_around_the_adapted_one_does_not_know",
        "test_continuous_batching.py::test_sequences_of_one_request_share_its_prompt",
    ),
    "A manager of continuous batching": (
        "test_continuous_batching.py::test_no_block_of_another_adapter_is_served",
        "test_continuous_batching.py::test_a_switch_while_requests_are_running_ends_them",
        "test_continuous_batching.py::test_a_running_manager_of_the_time_before_the_adapter",
        "test_continuous_batching.py::test_weights_edited_while_requests_are_running",
    ),
    "transformers serve names": ("integration/test_serve.py::test_answers_are_those_of_generate",),
    "vLLM serves one adapter": (
        "integration/test_vllm.py::test_refused_settings",
        "integration/test_vllm.py::test_refused_configurations",
        "integration/test_vllm.py::test_refused_layers",
        "integration/test_vllm.py::test_architectures_that_were_not_compared",
        "integration/test_vllm.py::test_adapters_that_are_not_pairs_alone",
    ),
    "The CUDA path of the vLLM plugin": ("integration/test_vllm.py::test_attention_of_a_batch",),
    "eager; and under the others": (
        "test_merged.py::test_what_no_kernel_computes_takes_the_formula_and_says_so",
        "test_merged.py::test_other_fallbacks",
        "test_merged.py::test_torch_func_transforms_take_the_formula",
    ),
    "transformers' own exporters": (
        "test_export.py::test_a_forward_that_exporters_exchange_is_refused",
        "test_export.py::test_transformers_exporters",
    ),
    "An exported or traced graph": (
        "test_export.py::test_every_way_gives_the_definition",
        "test_export.py::test_which_compilers_run_kernels",
    ),
    "Tensor parallelism: heads": (
        "test_bad_input.py::test_a_tensor_parallel_model_of_another_kind_is_refused",
        "integration/test_two_processes.py::test_on_both_ranks",
    ),
    "from_pretrained(distributed_config=...) with": ("integration/test_two_processes.py::test_on_both_ranks",),
    "inspection, prune_pairs, add_weighted_adapter": ("integration/test_two_processes.py::test_on_both_ranks",),
    "A base model that is wrong under transformers' plan": "a matter of transformers, of each version of it",
    "PeftModel.from_pretrained(base, path) onto": ("test_offload.py::test_loading_onto_an_offloaded_base",),
    'model.load_adapter(path, "default")': ("test_limits.py::test_loading_the_only_adapter_again_onto_a_base_on_disk",),
    "transformers' own model.load_adapter(path) after": ("test_offload.py::test_loading_onto_an_offloaded_base",),
    "modules_to_save or trainable_token_indices": (
        "test_offload.py::test_copies_of_offloaded_modules_are_refused",
        "test_limits.py::test_a_loras_copy_of_an_offloaded_module_is_the_base",
        "test_limits.py::test_a_loras_tokens_of_an_offloaded_embedding",
        "test_limits.py::test_tokens_of_an_embedding_that_is_offloaded_later",
        "test_limits.py::test_tokens_of_an_embedding_in_memory",
    ),
    "An adapter that is offloaded itself": (
        "test_offload.py::test_an_offloaded_adapter_that_would_not_learn_is_refused",
        "test_limits.py::test_an_offloaded_lora_learns_nothing_and_says_nothing",
    ),
    "Offloading with preload_module_classes": ("test_offload.py::test_layers_that_accelerate_loads_whole_are_refused",),
    "PeftMixedModel": (
        "test_limits.py::test_mixed_model_is_a_closed_list",
        "test_peft_api.py::test_lora_beside_hificl_in_either_order",
    ),
    "peft.utils.hotswap": (
        "test_limits.py::test_pefts_hotswap_knows_lora_alone",
        "test_strength.py::test_rescaling_without_pairs",
        "test_hotswap.py::test_the_weights_are_replaced_in_place",
        "test_peft_api.py::test_weights_are_replaced_in_place",
        "test_attention.py::test_compiles_whole_and_does_not_recompile_when_weights_are_swapped",
    ),
    "Adapters with different scale_self_attention or skip_first_token": (
        "test_peft_api.py::test_adapters_that_disagree_about_alpha_cannot_be_active_together",
        "test_adapter_names.py::test_adapters_that_disagree_about_alpha_share_no_batch",
        "test_first_token.py::test_sets_that_disagree_are_refused",
        "test_limits.py::test_a_union_refused_by_transformers_has_switched_the_layers_before",
    ),
    "Padded rows where positions are learned": ("test_positions.py::test_a_padded_row_equals_the_row_alone",),
    "A mask of four dimensions": ("test_positions.py::test_masks_of_other_forms_leave_positions_to_the_caller",),
    "past_key_values across set_adapter": ("test_limits.py::test_a_cache_keeps_what_the_earlier_adapter_computed",),
    "An adapter for training that is added after FSDP1": ("integration/test_two_processes.py::test_on_both_ranks",),
    "set_adapter to an adapter that was frozen": ("integration/test_two_processes.py::test_on_both_ranks",),
    "An adapter that is added after FSDP2": ("integration/test_two_processes.py::test_on_both_ranks",),
    "A fresh adapter as the start": (
        "test_peft_api.py::test_paper_init_is_not_the_identity",
        "integration/test_trl.py::test_the_reference_is_an_exact_copy_of_the_adapter",
        "integration/test_trl.py::test_a_fresh_adapter_is_compared_with_the_base",
    ),
    "PEFT and transformers attach an adapter before": (
        "test_loading.py::test_a_second_read_that_fails_leaves_an_adapter_without_effect",
        "test_loading.py::test_an_adapter_without_weights_is_not_used_in_silence",
    ),
    "The same, in transformers' own": (
        "test_loading.py::test_a_second_read_by_transformers_that_fails",
        "test_limits.py::test_transformers_finds_no_local_bin_file",
    ),
    "A stage of a pipeline": (
        "integration/test_two_processes.py::test_on_both_ranks",
        "test_loading.py::test_stages_of_a_pipeline_together_are_the_model",
        "test_loading.py::test_a_stage_takes_its_layers",
        "test_loading.py::test_a_stage_saves_its_own_layers",
        "test_bad_input.py::test_a_model_that_prepare_pippy_has_traced",
    ),
    "load_adapter(path, name) onto a name": (
        "test_limits.py::test_a_loaded_name_keeps_its_configuration",
        "test_limits.py::test_other_shapes_onto_a_loaded_name_are_noticed",
    ),
    "adapter_names=[...] on a model": ("test_attention.py::test_row_by_row_adapters_need_a_peft_model",),
    "adapter_names=[...] with different adapters": (
        "test_adapter_names.py::test_towers_of_the_zoo",
        "test_adapter_names.py::test_images_go_with_their_prompts",
        "test_adapter_names.py::test_images_that_may_belong_to_another_prompt_are_refused",
        "test_adapter_names.py::test_images_of_different_sizes_are_refused",
        "test_limits.py::test_a_lora_mixes_up_the_rows_of_a_tower",
    ),
    "Threads share a model": (
        "test_adapter_names.py::test_threads_do_not_meet",
        "test_limits.py::test_a_switch_is_one_for_all_threads",
        "test_limits.py::test_names_of_a_lora_reach_other_threads",
    ),
    "A LoRA and a HiFICL adapter of the same name": (
        "test_limits.py::test_a_file_of_two_methods_is_refused",
        "test_limits.py::test_a_file_of_two_methods_that_was_a_loras_is_the_lora",
    ),
    "An adapter named as a part of the module names": (
        "test_peft_api.py::test_adapters_named_as_layers_are_loaded_and_saved_whole_or_not_at_all",
        "test_peft_api.py::test_adapters_that_could_not_be_saved_are_not_trained",
    ),
    "modules_to_save of a further adapter": ("test_bad_input.py::test_a_module_to_save_that_holds_another_adapter",),
    "transformers' own model.delete_adapter": (
        "test_limits.py::test_transformers_activates_each_layers_own_after_a_deletion",
        "test_peft_api.py::test_deleting_an_active_adapter",
    ),
    "add_weighted_adapter": (
        "test_composition.py::test_what_cannot_be_combined",
        "test_composition.py::test_adapters_that_disagree_about_the_softmax",
        "test_composition.py::test_adapters_with_more_than_pairs",
        "test_composition.py::test_weights_that_are_not_here",
    ),
    "The strength of an adapter": (
        "test_strength.py::test_it_is_no_part_of_what_is_saved",
        "test_strength.py::test_strengths_that_cannot_be",
        "test_strength.py::test_compiled_code_is_traced_once_more_at_most",
        "test_strength.py::test_a_strength_that_was_set_before_compiling_never_traces_again",
        "test_composition.py::test_one_adapter_with_a_strength_and_one_that_is_left_out",
        "test_continuous_batching.py::test_a_switch_while_requests_are_running_ends_them",
    ),
    "hotswap_adapter onto a name": ("test_hotswap.py::test_an_adapter_that_does_not_fit",),
    "Saving under DeepSpeed ZeRO-3": (
        "test_loading.py::test_nothing_is_saved_empty",
        "test_loading.py::test_another_rank_may_have_nothing_to_save",
        "integration/test_two_processes.py::test_on_both_ranks",
    ),
    "A model that torch.compile was given whole": (
        "test_bad_input.py::test_models_that_are_wrapped",
        "test_loading.py::test_an_adapter_of_compiled_regions_and_of_the_model_as_it_was_are_the_same",
        "test_loading.py::test_whole_modules_in_compiled_regions",
    ),
    "unload() and disable_adapter()": ("test_limits.py::test_unloading_and_disabling_mean_every_adapter",),
    "An attention whose forward was replaced": ("test_attention.py::test_a_forward_that_was_replaced_is_refused",),
    "An attention whose forward is replaced after": (
        "test_watch.py::test_a_forward_that_is_replaced_after_attaching_is_reported_once",
        "test_watch.py::test_replaced_on_the_class",
        "test_watch.py::test_compiled_models_are_not_reported",
    ),
    "An attention function that others register": (
        "test_continuous_batching.py::test_a_replaced_attention_is_refused_by_the_call",
        "integration/test_replaced_attention.py::test_replaced_after_attaching",
        "integration/test_replaced_attention.py::test_torchs_function_is_patched",
        "integration/test_two_processes.py::test_on_both_ranks",
    ),
    "Context parallelism (torch's": ("integration/test_two_processes.py::test_on_both_ranks",),
    "The backward of gradient checkpointing after": ("integration/test_two_processes.py::test_on_both_ranks",),
    "torch's context_parallel on CPUs": ("integration/test_two_processes.py::test_on_both_ranks",),
    "torch's context_parallel without FSDP2": ("integration/test_two_processes.py::test_on_both_ranks",),
    "DeepSpeed's Ulysses with attention sinks": ("integration/test_two_processes.py::test_on_both_ranks",),
    "A base model that passes no gradient on": (
        "test_watch.py::test_an_adapter_without_a_gradient_is_reported_once",
        "test_watch.py::test_compiled_models_are_not_reported",
        "integration/test_torchao.py::test_an_adapter_that_gets_no_gradient_is_reported_once",
    ),
    "An adapted attention holds a copy": (
        "test_attention.py::test_a_later_change_of_the_configuration_is_not_seen",
        "test_attention.py::test_implementations_agree_and_switch_live",
    ),
    "CUDA: tests/test_gpu.py ran": "no CUDA device is here; test_gpu.py runs where there is one",
    "Speed on CUDA": "a measurement on an H100, stored with the benchmarks",
    "to_prefix_cache and to_prefix_tuning": (
        "test_prefix.py::test_refused_with_the_reason",
        "test_prefix.py::test_architectures_that_are_refused",
        "test_prefix.py::test_every_architecture_is_exact_or_refused",
    ),
    "to_prefix_tuning of keys and values": (
        "test_prefix.py::test_heads_that_peft_lays_out_in_another_way",
        "test_prefix.py::test_keys_and_values_of_different_shapes",
    ),
    "A prefix-tuning adapter with PEFT 0.21": ("test_prefix.py::test_prefix_tuning_in_a_process_without_this_package",),
    "python -m peft_hificl convert": ("test_convert.py::test_bad_files", "test_convert.py::test_damaged_files"),
    "initialize_from_demonstrations with padding": (
        "test_demonstrations.py::test_padding_is_refused",
        "test_demonstrations.py::test_a_merged_adapter_is_refused",
        "test_demonstrations.py::test_an_offloaded_adapter_is_refused",
        "test_demonstrations.py::test_positions_in_several_dimensions_are_refused_unless_given",
        "test_demonstrations.py::test_tokens_of_its_own_need_weights_and_enough_tokens",
    ),
    "initialize_from_demonstrations on a model without": (
        "test_demonstrations.py::test_without_rotary_embeddings_the_prompt_is_read_where_any_other_is",
    ),
    "initialize_from_demonstrations on a model that counts": (
        "test_demonstrations.py::test_demonstrations_lie_too_far_off_where_positions_begin_at_1",
    ),
    "inspection.record and compiled code": (
        "test_inspection.py::test_a_compiled_model_is_recorded",
        "test_inspection.py::test_a_whole_graph_cannot_be_recorded",
    ),
    "inspection.record of calls": ("test_inspection.py::test_what_cannot_be_read_says_why",),
    "inspection.read_pairs where": ("test_reading.py::test_what_cannot_be_read_is_refused",),
    "prune_pairs, pair_effects": (
        "test_pruning.py::test_an_adapter_that_is_not_active_alone_is_refused",
        "test_pruning.py::test_a_model_without_the_configuration_or_the_parameters_is_refused",
    ),
    "torch.compile: the first switch": (
        "test_attention.py::test_switching_by_name_traces_once_per_adapter",
        "test_limits.py::test_a_switch_of_a_lora_traces_once_more",
    ),
    "The paper's learning rate": "seen on a pretrained model that is not here",
}


def documented_rows() -> list[str]:
    """The first cell of every row, without its markup."""
    tokens = MarkdownIt("commonmark").enable("table").parse(DOCUMENT.read_text(encoding="utf-8"))
    return [
        "".join(part.content for part in text.children)
        for row, cell, text in zip(tokens, tokens[1:], tokens[2:], strict=False)
        if (row.type, cell.type) == ("tr_open", "td_open")
    ]


def test_rows_are_those_of_the_document() -> None:
    found = [[beginning for beginning in ROWS if row.startswith(beginning)] for row in documented_rows()]
    assert found == [[beginning] for beginning in ROWS]


def test_the_named_tests_exist() -> None:
    there = {
        f"{path.relative_to(TESTS).as_posix()}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {test for tests in ROWS.values() if isinstance(tests, tuple) for test in tests} <= there


# -- limits of PEFT, transformers and torch, in the order of the document ---------------------------------------------

INPUTS = inputs_for("gqa")
CPU = torch.device("cpu")


def lora(**kwargs: object) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **kwargs})


Method = Callable[..., PeftConfig]
both_methods = pytest.mark.parametrize("method", [lora, config], ids=["lora", "hificl"])


def attached(base: nn.Module, method: Method, seed: int = 1, name: str = "default", **kwargs: object) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base, method(**kwargs), adapter_name=name).eval()


def in_a_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


@both_methods
def test_unload_keeps_whole_modules_but_no_tokens(method: Method) -> None:
    base = build("gqa")
    tokens = base.get_input_embeddings().weight.detach().clone()
    model = attached(base, method, modules_to_save=["lm_head"], trainable_token_indices=[7])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter)
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    unloaded = model.unload()
    assert unloaded.lm_head.weight is head
    assert torch.equal(unloaded.get_input_embeddings().weight, tokens)


def test_without_the_import_loading_says_which_name_is_missing(tmp_path: Path) -> None:
    adapted("gqa").save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "KeyError: 'HIFICL'" in done.stderr  # README tells what to do


def partly_on_disk(folder: Path, *names: str) -> PreTrainedModel:
    here = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {name: "disk" if name in names else "cpu" for name in here}
    return accelerate.dispatch_model(build("gqa"), places, offload_dir=folder, main_device="cpu").eval()


@both_methods
def test_loading_the_only_adapter_again_onto_a_base_on_disk(method: Method, tmp_path: Path) -> None:
    """PEFT lays the model out anew then; a second adapter loads."""
    attached(build("gqa"), method).save_pretrained(tmp_path / "saved")
    model = attached(partly_on_disk(tmp_path, "model.layers.0"), method)
    model.load_adapter(tmp_path / "saved", "second")
    model = attached(partly_on_disk(tmp_path, "model.layers.0"), method)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model.load_adapter(tmp_path / "saved", "default")


def test_a_loras_copy_of_an_offloaded_module_is_the_base(tmp_path: Path) -> None:
    """It gets no gradient, and what is loaded into it has no effect."""
    whole = {"modules_to_save": ["lm_head"]}
    plain = attached(build("gqa"), lora, **whole)
    of_the_base = logits(plain, **INPUTS)
    with torch.no_grad():
        plain.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    plain.save_pretrained(tmp_path / "trained")
    assert not torch.allclose(logits(plain, **INPUTS), of_the_base)
    model = attached(partly_on_disk(tmp_path, "lm_head"), lora, **whole)
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.grad is None
    model.load_adapter(tmp_path / "trained", "trained")
    for name in ("default", "trained"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, **INPUTS), of_the_base)


def test_a_loras_tokens_of_an_offloaded_embedding(tmp_path: Path) -> None:
    model = attached(partly_on_disk(tmp_path, "model.embed_tokens"), lora, trainable_token_indices=[7])
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model(**INPUTS)


@both_methods
def test_tokens_of_an_embedding_that_is_offloaded_later(method: Method) -> None:
    model = attached(build("gqa"), method, trainable_token_indices=[7])
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model(**INPUTS)


@both_methods
def test_tokens_of_an_embedding_in_memory(method: Method, tmp_path: Path) -> None:
    want = logits(attached(build("gqa"), method, trainable_token_indices=[7]), **INPUTS)
    model = attached(partly_on_disk(tmp_path, "lm_head"), method, trainable_token_indices=[7])
    torch.testing.assert_close(logits(model, **INPUTS), want)


def test_an_offloaded_lora_learns_nothing_and_says_nothing() -> None:
    model = attached(build("gqa"), lora)
    accelerate.cpu_offload(model, CPU)
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mixed_model_is_a_closed_list() -> None:
    with pytest.raises(ValueError, match="HIFICL"):
        get_peft_model(build("gqa"), config(), mixed=True)


def test_pefts_hotswap_knows_lora_alone(tmp_path: Path) -> None:
    model = adapted("gqa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="HIFICL"):
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")


def test_a_union_refused_by_transformers_has_switched_the_layers_before() -> None:
    model = build("gqa")
    model.add_adapter(config(), "a")
    model.add_adapter(config(scale_self_attention=False, layers_to_transform=[1]), "b")  # meets "a" in layer 1 alone
    model.add_adapter(config(), "c")
    with pytest.raises(ValueError, match=r"disagree about scale_self_attention: \{'a': True, 'b': False\}"):
        model.set_adapter(["a", "b"])
    assert [layer.active_adapters for layer in hificl_layers(model)] == [["a", "b"], ["c"]]


@both_methods
@torch.no_grad()
def test_a_cache_keeps_what_the_earlier_adapter_computed(method: Method) -> None:
    model, ids = attached(build("gqa"), method, name="a"), INPUTS["input_ids"]
    torch.manual_seed(2)
    model.add_adapter("b", method())
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    earlier = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    model.set_adapter("b")
    got = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    for layer, (keys, values) in zip(cache.layers, earlier, strict=True):
        assert torch.equal(layer.keys[:, :, :5], keys) and torch.equal(layer.values[:, :, :5], values)
    assert not torch.allclose(got, model(input_ids=ids).logits[:, 5:], atol=1e-3)


@both_methods
def test_transformers_finds_no_local_bin_file(method: Method, tmp_path: Path) -> None:
    attached(build("gqa"), method).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        build("gqa").load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("method", "stored"),
    [(lora, {"lora_alpha": 800}), (config, {"scale_self_attention": False})],
    ids=["lora", "hificl"],
)
def test_a_loaded_name_keeps_its_configuration(method: Method, stored: dict[str, object], tmp_path: Path) -> None:
    saved = attached(build("gqa"), method, seed=2, **stored)
    saved.save_pretrained(tmp_path)
    model = attached(build("gqa"), method)
    for same in (False, True):
        model.load_adapter(tmp_path, "default")
        model.set_adapter("default")
        assert torch.equal(logits(model.eval(), **INPUTS), logits(saved, **INPUTS)) == same
        model.delete_adapter("default")  # which is what to do


@pytest.mark.parametrize("stored", [{"n": 4}, {"r": 3}, {"factorize_keys": False}, {"factorize_values": False}])
def test_other_shapes_onto_a_loaded_name_are_noticed(stored: dict[str, object], tmp_path: Path) -> None:
    adapted("gqa", **stored).save_pretrained(tmp_path)
    model = adapted("gqa")
    want = logits(model, **INPUTS)
    with pytest.raises(ValueError, match="state dict (has shape|lacks)"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, **INPUTS), want)


def test_a_lora_mixes_up_the_rows_of_a_tower() -> None:
    """Two images, both of the first prompt: the second image gets the adapter of the second prompt."""
    tower = {"target_modules": r".*vision_tower.*q_proj"}
    model = attached(build("vlm"), lora, name="a", **tower)
    torch.manual_seed(2)
    model.add_adapter("b", lora(**tower))
    inputs = inputs_for("vlm", length=11)
    inputs["input_ids"][0, 5:9] = IMAGE
    inputs["input_ids"][1, 1:5] = 7
    want = logits(model, **inputs)[0]
    torch.testing.assert_close(logits(model, **inputs, adapter_names=["a", "a"])[0], want)
    assert not torch.allclose(logits(model, **inputs, adapter_names=["a", "b"])[0], want, atol=1e-3)


@both_methods
def test_a_switch_is_one_for_all_threads(method: Method) -> None:
    model = attached(build("gqa"), method, name="a")
    torch.manual_seed(2)
    model.add_adapter("b", method())
    in_a_thread(lambda: model.set_adapter("b"))
    assert model.active_adapters == ["b"]
    assert torch.equal(logits(model, **INPUTS), logits(attached(build("gqa"), method, seed=2), **INPUTS))


def test_names_of_a_lora_reach_other_threads() -> None:
    """A forward on another thread while one with names runs on this one."""
    model = attached(build("gqa"), lora, name="a")
    torch.manual_seed(2)
    model.add_adapter("b", lora())
    want, seen, todo = logits(model, **INPUTS), [], [lambda: seen.append(logits(model, **INPUTS))]
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda *_: in_a_thread(todo.pop()) if todo else None)
    of_b = logits(model, **INPUTS, adapter_names=["b", "b"])
    assert not torch.equal(seen[0], want) and torch.equal(seen[0], of_b)


def saved_under_one_name(first: Method, second: Method, folder: Path) -> Path:
    base = build("gqa")
    base.add_adapter(first(), "same")
    attached(base, second, seed=2, name="same").save_pretrained(folder)
    return folder / "same"


def test_a_file_of_two_methods_is_refused(tmp_path: Path) -> None:
    folder = saved_under_one_name(lora, config, tmp_path)
    with pytest.raises(ValueError, match=r"has unexpected .*lora_A"):
        PeftModel.from_pretrained(build("gqa"), folder)


def test_a_file_of_two_methods_that_was_a_loras_is_the_lora(tmp_path: Path) -> None:
    folder = saved_under_one_name(config, lora, tmp_path)
    assert any("hificl_K_A" in key for key in load_file(folder / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(build("gqa"), folder)
    assert torch.equal(logits(loaded, **INPUTS), logits(attached(build("gqa"), lora, seed=2), **INPUTS))


@both_methods
def test_transformers_activates_each_layers_own_after_a_deletion(method: Method) -> None:
    model = build("gqa")
    target = ".q_proj" if method is lora else ""
    for name, layers in {"a": [0, 1], "b": [0], "c": [1]}.items():
        model.add_adapter(method(target_modules=[f"layers.{i}.self_attn{target}" for i in layers]), name)
    model.set_adapter("a")
    with pytest.warns(UserWarning) as caught:
        model.delete_adapter("a")
    assert [layer.active_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)] == [["b"], ["c"]]
    for name, warning in zip("bc", caught, strict=True):
        assert f"Setting active adapter to {name}." in str(warning.message)


def test_unloading_and_disabling_mean_every_adapter() -> None:
    base = build("gqa")
    bare = logits(base, **INPUTS)
    base.add_adapter(lora(), "lora")
    of_the_lora = logits(base, **INPUTS)
    model = attached(base, config, name="hificl")
    assert not torch.equal(of_the_lora, bare)
    with model.disable_adapter():
        assert torch.equal(logits(model, **INPUTS), bare)
    assert torch.equal(logits(model.unload(), **INPUTS), bare)


def test_a_switch_of_a_lora_traces_once_more() -> None:
    torch._dynamo.reset()
    model = attached(build("gqa"), lora, name="a")
    model.add_adapter("b", lora())
    model.requires_grad_(False)
    counter = CompileCounter()
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    for name in ("a", "b", "a", "b"):
        model.set_adapter(name, inference_mode=True)
        torch.testing.assert_close(logits(compiled, **INPUTS), logits(model, **INPUTS), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2
