"""Blocks of a paged cache that several requests use: found by their tokens and by the adapters that computed them.

transformers finds the blocks of a common prefix by hashes of their token ids, each chained to that of the block before.
But a cache may outlive the adapters that wrote to it, and weights may be edited in place.  So the first ids of each
request are mixed with a digest of the active adapters before they are hashed, and the chain carries it on to all of its
blocks.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from array import array
from typing import Any
from weakref import ref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from .layer import HiFICLLayer
from .ops.formula import OF_THE_SOFTMAX

_managers: list[ref[ContinuousBatchingManager]] = []  # those of adapted models


class BlockSharing:
    """Lets the requests of a cache use blocks of each other that the same adapters have computed.

    The adapters are compared with what they were whenever a forward begins, and before requests are admitted: which
    are active, their strengths, and all weights, as edits through `.data` leave no other trace.  If they have changed,
    requests that are running go on with the keys that they have, but no further block of theirs is registered.  Nor are
    those of forked sequences, and of requests that come back from being offloaded.

    To compare, the host waits for the device, once per forward; so with `use_async_batching` forwards do not overlap.
    If it is not certain what the model computes (see `adapters_of`), sharing is turned off, for good.

    Args:
        cache: a cache that no adapter has written to.
        model: the model that it belongs to.
        begun: whether requests that are running have keys of earlier forwards.
    """

    def __init__(self, cache: PagedAttentionCache, model: nn.Module, begun: bool) -> None:
        self._cache, self._model = ref(cache), ref(model)
        self._layers: list[HiFICLLayer] = []
        self._form: list[Any] = []
        self._weights: list[Tensor] = []
        self._words = array("i")  # of the digest
        self._admitting: threading.Thread | None = None  # a manager's, since its last forward
        self._pure: set[str] = set()  # the requests all of whose keys are of the present adapters
        self._compare()
        if not begun:
            self._pure |= self._running()
        cache.search_prefix_match = self._search
        cache.mark_complete_blocks = self._mark

    @property
    def has_others(self) -> bool:
        """Whether a request is running some of whose keys were computed by other adapters than the present ones."""
        return not self._running() <= self._pure

    def begin_forward(self) -> None:
        """Compare the adapters, before anything is computed with them."""
        self._admitting = None
        self._compare()
        self._pure &= self._running()

    def _search(self, request_id: str, prompt_ids: list[int]) -> int:
        """In the place of the cache's own: give a new request the blocks that are there, and count their tokens."""
        # Many requests may wait. From here to the next forward, or the end of the thread by an error, adapters have to
        # stay as they are: a manager pauses before it admits.
        if self._admitting is not threading.current_thread():
            self._compare()
        self._admitting = threading.current_thread()
        self._pure.add(request_id)
        cache: Any = self._cache()
        return int(type(cache).search_prefix_match(cache, request_id, self._mixed(prompt_ids)))

    def _mark(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """In the place of the cache's own: register the blocks of a request that the last forward has completed."""
        # No layer is called, and nothing noticed, while the model is without any: they are looked for here.
        if complete_blocks and state.request_id in self._pure and adapters_of(self._model()) == self._layers:
            mixed = copy.copy(state)
            mixed.initial_tokens = self._mixed(state.initial_tokens + state.generated_tokens)
            mixed.generated_tokens = []
            cache: Any = self._cache()
            type(cache).mark_complete_blocks(cache, mixed, complete_blocks)

    def _mixed(self, ids: list[int]) -> list[int]:
        return [token ^ word for token, word in zip(ids, self._words, strict=False)] + ids[len(self._words) :]

    def _running(self) -> set[str]:
        """The requests that have blocks."""
        cache: Any = self._cache()
        return set().union(*(allocator.block_table for allocator in cache.cache_allocators.values()))

    def _compare(self) -> None:
        """Make a new digest if the adapters are not what they were."""
        layers = adapters_of(self._model())
        found = None if layers is None else contents(layers)
        if layers is None or found is None:
            turn_off(self._cache())
            return
        form, weights = found
        same = layers == self._layers and form == self._form
        if same and all(map(torch.equal, weights, self._weights)):
            return
        self._layers, self._form, self._weights = layers, form, weights
        digest = hashlib.blake2b(repr(form).encode())
        for part in weights:
            digest.update(part.view(torch.uint8).cpu().numpy().data)
        self._words = array("i", digest.digest())
        self._pure.clear()


def note(manager: ContinuousBatchingManager) -> None:
    """Let `sharing_of` know a manager that an adapted model has made."""
    _managers.append(ref(manager, _managers.remove))


def sharing_of(cache: PagedAttentionCache, begun: bool) -> BlockSharing | None:
    """Prepare a cache that an adapter is about to write to for the first time; None: its requests share no blocks.

    They do where transformers shares blocks and offers what `BlockSharing` needs (from 5.18 on), and where the manager
    was made by the adapted model itself.
    """
    living = [manager for manager in (known() for known in list(_managers)) if manager is not None]
    model = next((m.model for m in living if getattr(m.batch_processor, "cache", None) is cache), None)
    usable = all(hasattr(cache, name) for name in ("cache_allocators", "search_prefix_match", "mark_complete_blocks"))
    if model is not None and usable and cache.use_prefix_sharing:
        return BlockSharing(cache, model, begun)
    turn_off(cache)
    return None


def turn_off(cache: Any) -> None:
    """Let no request use blocks of another.  (The sequences of one request still share their prompt.)"""
    cache.use_prefix_sharing = cache.allow_block_sharing = False


def adapters_of(model: nn.Module | None) -> list[HiFICLLayer] | None:
    """The HiFICL layers of a model; None if it has been trained in another way too: LoRA, `modules_to_save`, ..."""
    layers: list[HiFICLLayer] = []
    rest: list[nn.Module | None] = [model]
    while rest:  # not `model.modules()`, which fails while another thread attaches an adapter
        module = rest.pop()
        if isinstance(module, HiFICLLayer):
            layers.append(module)
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return None
        elif module is not None:
            rest.extend(module._modules.values())
    return layers


def contents(layers: list[HiFICLLayer]) -> tuple[list[Any], list[Tensor]] | None:
    """What the active adapters of these layers are: all but their weights, and these, one tensor per device and dtype.

    None if some weights are elsewhere: offloaded, or divided among ranks.
    """
    form: list[Any] = []
    parts: dict[Any, list[Tensor]] = {}
    for number, layer in enumerate(layers):
        for name in layer.active_names:
            form.append((number, layer.scaling[name], *(getattr(layer, field)[name] for field in OF_THE_SOFTMAX)))
            for kind in layer.adapter_layer_names:
                factors = getattr(layer, kind)
                if name in factors:
                    weight = factors[name].weight
                    if type(weight) is not nn.Parameter or weight.is_meta or not weight.numel():
                        return None
                    place = weight.device, weight.dtype
                    form.append((kind, weight.shape, place))
                    parts.setdefault(place, []).append(weight.detach().flatten())
    return form, [torch.cat(part) for part in parts.values()]
