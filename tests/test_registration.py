"""HiFICL as a true member of PEFT's registry."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import warnings

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

import peft_hificl
from peft_hificl import HiFICLConfig, HiFICLModel, registration


def test_the_member_is_like_any_other() -> None:
    member = HiFICLConfig().peft_type
    assert isinstance(member, PeftType) and isinstance(member, str) and member == "HIFICL"
    assert PeftType("HIFICL") is PeftType["HIFICL"] is PeftType.HIFICL is member
    assert member in PeftType and "HIFICL" in list(PeftType) and "HIFICL" in PeftType.__members__
    assert (member.name, member.value, str(member)) == ("HIFICL", "HIFICL", "PeftType.HIFICL")
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"HIFICL"' and hash(member) == hash(PeftType.HIFICL)
    assert PeftType.LORA in PeftType and len(set(PeftType)) == len(list(PeftType))


def test_the_mappings_know_it() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HIFICL] is HiFICLConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HIFICL] is HiFICLModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.HIFICL] == "hificl_" == HiFICLModel.prefix
    assert isinstance(get_peft_config({"peft_type": "HIFICL", "n": 4}), HiFICLConfig)


def test_registering_again_changes_nothing() -> None:
    members = list(PeftType)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(registration)
        registration.add_peft_type()
        registration.register(HiFICLConfig, HiFICLModel)
    assert list(PeftType) == members and PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HIFICL] is peft_hificl.HiFICLModel


def test_a_method_of_pefts_own_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.HIFICL, Theirs)
    with pytest.warns(UserWarning, match=r"PEFT already has a method HIFICL.*Theirs"):
        registration.register(HiFICLConfig, HiFICLModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HIFICL] is Theirs
