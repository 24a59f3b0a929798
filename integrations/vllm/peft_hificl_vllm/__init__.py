"""HiFICL adapters in vLLM: a load format that reads an adapter, and attention backends that mix its pairs in."""

from __future__ import annotations

from vllm.model_executor.model_loader import register_model_loader
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from .loader import LOAD_FORMAT, HiFICLModelLoader, backend_path


def register() -> None:
    """Make the load format and the attention backends known: the entry point ``vllm.general_plugins``.

    vLLM calls it in each of its processes, before a layer is made.
    """
    register_model_loader(LOAD_FORMAT)(HiFICLModelLoader)
    path = backend_path()
    if path is None:
        return
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu():
        # A CPU has one backend, whatever is asked for.  This one is the same where there are no pairs.
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
