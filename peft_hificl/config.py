"""The configuration of a HiFICL adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, Optional, Union

from peft import PeftConfig
from peft.utils import PeftType

from . import model_card

_NUMBER = ((int,), "an int of at least 1")
_SWITCH = ((bool,), "True or False")
_NAMES = ((str, list, tuple, set, NoneType), "a list of names, a regex or None")
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "n": _NUMBER,
    "r": _NUMBER,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": ((int, list, tuple, NoneType), "an index, a list of indices or None"),
    "layers_pattern": ((str, list, tuple, NoneType), "a name, a list of names or None"),
    "modules_to_save": ((list, tuple, set, NoneType), "a list of names or None"),
    "trainable_token_indices": ((list, tuple, dict, NoneType), "a list of indices, a dict of such lists or None"),
    "init_weights": ((bool, str), "True, False, 'unit_keys' or 'identity'"),
    "factorize_keys": _SWITCH,
    "factorize_values": _SWITCH,
    "scale_self_attention": _SWITCH,
    "pair_weights": _SWITCH,
    "skip_first_token": _SWITCH,
    "heads": ((str,), "'query' or 'kv'"),
}
_HEADS = ("query", "kv")


@dataclass
class HiFICLConfig(PeftConfig):
    """The configuration of a [`HiFICLModel`]: n virtual key-value pairs per attention head, factorised at rank r.

    Parameters per adapted attention with H query heads and head dimension d: ``2 * H * r * (n + d)``, and ``H * n``
    more with `pair_weights`.  With ``heads="kv"``, H is the number of key/value heads.

    Args:
        n (`int`): Virtual key-value pairs per attention head.
        r (`int`): Rank of the factorisation ``K_D = K_A K_B``, ``V_D = V_A V_B``.
        target_modules (`Optional[Union[List[str], str]]`): Attention modules to adapt, as names or a regular
            expression.  None: every self-attention of the text decoder (of the encoder, where there is no decoder),
            found by structure.  What was found replaces the None when the adapter is attached, and is saved: a regular
            expression that fits any number of layers or, if there is none that fits, the names.  If the same object is
            then used for another model, whose targets differ, that model gets a copy.
        exclude_modules (`Optional[Union[List[str], str]]`): Modules to leave out, as names or a regular expression.
        layers_to_transform (`Optional[Union[List[int], int]]`): Adapt only the layers with these indices.
        layers_pattern (`Optional[Union[List[str], str]]`): Name of the list of layers that the indices count in.
        modules_to_save (`Optional[List[str]]`): Further modules that are trained and saved whole.
        trainable_token_indices (`Optional[Union[List[int], dict[str, List[int]]]]`): Tokens whose embeddings are
            trained and saved.
        init_weights (`Union[bool, Literal["unit_keys", "identity"]]`): True: the paper's initialisation (`K_A`, `V_A`
            ~ N(0, 1), `K_B` ~ 0.01 N(0, 1), `V_B` = 0).  The virtual values are zero then, but the virtual keys take
            part in the softmax: a fresh adapter is NOT the identity, unless `scale_self_attention=False`.
            "unit_keys": `K_B` ~ N(0, 1 / r) instead, so that the virtual keys begin with variance one instead of near
            zero.  "identity": as True, with log-weights of ``log(0.0002 / n)``, so that a fresh adapter answers as the
            base model does, to a thousandth; needs `pair_weights` and `skip_first_token`, and a larger learning rate
            of the log-weights ([`parameter_groups`]).  False: all factors ~ N(0, 1).  See also
            [`initialize_from_demonstrations`].
        factorize_keys (`bool`): False: `K_D` is learned whole (the paper's ablation "- LoRA on K").
        factorize_values (`bool`): False: `V_D` is learned whole, from zero (the paper's ablation "- LoRA on V").
        scale_self_attention (`bool`): False: alpha = 1, the self-attention is not scaled down (the paper's ablation
            "w/o SA scaling").
        pair_weights (`bool`): True: each pair of each head also learns a log-weight w, starting at zero, which is added
            to its score: ``Z_D = sum_i exp(s(k_D,i) + w_i)``.  Not in the paper.  It adds ``H * n`` parameters.
        skip_first_token (`bool`): True: a token that sees no token but itself (the first of a row, or of a packed
            document) attends without the virtual pairs.  Not in the paper.  Many language models make their first
            token an attention sink by that very self-attention, and the pairs would take most of it.
        heads (`Literal["query", "kv"]`): "query": each query head has pairs of its own, as in the paper.  "kv": each
            key/value head has, which all its query heads share, as they share the keys and values of the context.
            Where attention is grouped, such an adapter is smaller, and [`to_prefix_cache`] can hand it to engines that
            do not know HiFICL.  If every query head has a key/value head of its own, both are the same.

    Raises:
        ValueError: a number below 1, an unknown `init_weights` or `heads`, or `layers_pattern` without
            `layers_to_transform`.
        TypeError: a value of the wrong type.

    Example:

        >>> from peft_hificl import HiFICLConfig
        >>> config = HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8)
        >>> config.peft_type.value
        'HIFICL'
    """

    n: int = field(default=8, metadata={"help": "Virtual key-value pairs per attention head."})
    r: int = field(default=8, metadata={"help": "Rank of the factorisation of the virtual keys and values."})
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Attention modules to adapt: a list of names (matched whole or as the end of a module's name) or "
            "a regular expression. None: every self-attention of the text decoder, found by structure."
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Modules to leave out: a list of names or a regular expression."},
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Adapt only the layers with these indices."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` counts in."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Further modules (for instance a classification head) that are trained and saved whole."},
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(
        default=None,
        metadata={
            "help": "Token indices whose embeddings are trained and saved; a dict names the embedding layer, as in "
            "{'embed_tokens': [0, 1]}."
        },
    )
    init_weights: Union[bool, Literal["unit_keys", "identity"]] = field(
        default=True,
        metadata={
            "help": "True: the paper's initialisation (V_B = 0). 'unit_keys': the same, with virtual keys of variance "
            "one. 'identity': the same as True, with pairs of almost no weight. False: all factors random."
        },
    )
    factorize_keys: bool = field(
        default=True, metadata={"help": "False: learn the virtual keys whole instead of as K_A K_B."}
    )
    factorize_values: bool = field(
        default=True, metadata={"help": "False: learn the virtual values whole, from zero, instead of as V_A V_B."}
    )
    scale_self_attention: bool = field(
        default=True, metadata={"help": "False: alpha = 1, the self-attention output is not scaled down."}
    )
    pair_weights: bool = field(
        default=False,
        metadata={"help": "True: learn a log-weight per pair and query head, added to its score."},
    )
    skip_first_token: bool = field(
        default=False,
        metadata={"help": "True: a token that sees only itself (the first of a row) attends without the pairs."},
    )
    heads: Literal["query", "kv"] = field(
        default="query",
        metadata={"help": "Whose pairs: 'query', each query head its own; 'kv', each key/value head its own."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["HIFICL"]
        for name, (types, words) in _TYPES.items():
            value = getattr(self, name)
            # Python counts True as an int, but it is not a number of pairs.
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise TypeError(f"HiFICLConfig.{name} must be {words}, found {value!r}.")
        if isinstance(self.init_weights, str) and self.init_weights not in ("unit_keys", "identity"):
            raise ValueError(
                f"HiFICLConfig.init_weights must be {_TYPES['init_weights'][1]}, found {self.init_weights!r}."
            )
        if self.init_weights == "identity" and self.scale_self_attention:
            # Without skip_first_token, even the smallest weight changes the first token of a model with a sink.
            missing = [name for name in ("pair_weights", "skip_first_token") if not getattr(self, name)]
            if missing:
                raise ValueError(
                    f"HiFICLConfig.init_weights='identity' needs {' and '.join(f'{name}=True' for name in missing)}: "
                    "set it, or set scale_self_attention=False, with which every start is the identity but False."
                )
        if self.heads not in _HEADS:
            raise ValueError(f"HiFICLConfig.heads must be {_TYPES['heads'][1]}, found {self.heads!r}.")
        for name in ("n", "r"):
            if getattr(self, name) < 1:
                raise ValueError(f"HiFICLConfig.{name} must be {_TYPES[name][1]}, found {getattr(self, name)}.")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        # With a tuple, PEFT would train one number of the embedding, that in this row and column.
        tokens = self.trainable_token_indices
        if isinstance(tokens, tuple):
            self.trainable_token_indices = list(tokens)
        elif isinstance(tokens, dict):
            self.trainable_token_indices = {k: list(v) if isinstance(v, tuple) else v for k, v in tokens.items()}
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"HiFICLConfig.layers_pattern={self.layers_pattern!r} needs layers_to_transform: set it to the "
                "indices of the layers to adapt."
            )

    def parameter_shapes(self, heads: int, key_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter of this adapter on one attention with so many heads that have pairs."""
        shapes: dict[str, tuple[int, ...]] = {}
        for kind, factorize, dim in (("K", self.factorize_keys, key_dim), ("V", self.factorize_values, value_dim)):
            if factorize:
                shapes[f"hificl_{kind}_A"] = (heads, self.n, self.r)
                shapes[f"hificl_{kind}_B"] = (heads, self.r, dim)
            else:
                shapes[f"hificl_{kind}"] = (heads, self.n, dim)
        if self.pair_weights:
            shapes["hificl_W"] = (heads, self.n)
        return shapes

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and add to the model card that PEFT has written there how to load the adapter."""
        # PEFT saves the configuration last, so everything that the card describes has been written.
        super().save_pretrained(save_directory, **kwargs)
        model_card.update(save_directory)
