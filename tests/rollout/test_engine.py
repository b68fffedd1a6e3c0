"""The protocol: what a request may ask, and what RL refuses."""

from __future__ import annotations

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rollout import CAPABILITIES, Engine, GenerateEngine, Request, check_for_rl


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", []),
        ("n", 0),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("stop_ids", (-1,)),
        ("stop", "text"),
        ("stop", ("",)),
    ],
)
def test_a_request_that_nobody_can_honour_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        Request(**{"prompt_ids": [3], field: value})


def test_the_default_engine_fits_the_protocol_and_claims_known_capabilities(policy):
    engine = GenerateEngine(policy)
    assert isinstance(engine, Engine)
    assert engine.capabilities <= CAPABILITIES


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}, {"repetition_penalty": 1.1}]
)
def test_rl_refuses_sampling_from_another_distribution(policy, setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        check_for_rl(GenerateEngine(policy), **setting)


def test_rl_accepts_any_temperature_without_filters(policy):
    check_for_rl(GenerateEngine(policy), temperature=0.7, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


@pytest.mark.parametrize("missing", ["token_ids", "logprobs"])
def test_rl_refuses_an_engine_without(policy, missing):
    engine = GenerateEngine(policy)
    engine.capabilities = engine.capabilities - {missing}
    with pytest.raises(UserError, match=missing):
        check_for_rl(engine)
