"""The table of optimizers: each is AdamW to its precision, resumes bit for bit, or says why it cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast import SFTConfig, SFTTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.trainers.optimizers import build_optimizer

ROWS = [{"prompt": f"{i}=", "completion": w} for i, w in enumerate(("a", "bc", "d", "ef", "ghi"))]


def trainer(model, tokenizer, settings, **more):
    config = SFTConfig(**settings(**{"learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, "packing": False, **more}))
    return SFTTrainer(model, config, train_dataset=ROWS, processing_class=tokenizer)


def adam(parameter, gradients, rate, decay):
    """AdamW's recursion in fp64 with its default betas and eps."""
    p, m, v = parameter.double(), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        p = p * (1 - rate * decay)
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        p = p - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("adamw_8bit", 2e-3)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_adamw(name, tolerance, decay):
    """8,192 elements: more than what bitsandbytes keeps in 32 bit. Steps are of 1e-2, so that 2e-3 tells them apart."""
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(64, 128))
    gradients = [torch.randn(64, 128) + 1 for _ in range(3)]
    want = adam(parameter.detach(), gradients, 1e-2, decay)
    optimizer = build_optimizer(name, [parameter], 1e-2, decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    assert (parameter.double() - want).abs().median() < tolerance
    moments = [t for t in optimizer.state[parameter].values() if torch.is_tensor(t) and t.shape == parameter.shape]
    assert {t.dtype for t in moments} == {torch.uint8 if name == "adamw_8bit" else torch.float32}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_resumed_run_has_the_moments_it_stopped_with(name, make_model, tokenizer, settings, run):
    """Bit for bit; the embeddings and projections of this width are over the 4,096 elements that 8 bit begins at."""
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    make = lambda **more: trainer(make_model(intermediate_size=160), tokenizer, settings, optim=name, **more)
    first = make()
    whole = run(first)
    checkpoint = Path(first.args.output_dir) / "checkpoints" / "step-00000002"
    again = make()
    resumed = run(again, resume_from_checkpoint=str(checkpoint))
    assert again.step == 4
    for key, weight in whole.weights.items():
        assert torch.equal(resumed.weights[key], weight), key
    if name == "adamw_8bit":
        states = again.optimizer.optimizer.state.values()
        assert any(s["state1"].dtype == torch.uint8 for s in states)


def test_the_setting_reaches_the_run(make_model, tokenizer, settings):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = trainer(make_model(), tokenizer, settings, optim="adamw_8bit", weight_decay=0.1)
    inner = made.optimizer.optimizer
    assert type(inner) is bitsandbytes.optim.AdamW8bit
    assert [g["weight_decay"] for g in inner.param_groups] == [0.1, 0.0]
    assert type(trainer(make_model(), tokenizer, settings).optimizer.optimizer) is torch.optim.AdamW


def test_what_cannot_be_had_is_refused_by_name(make_model, tokenizer, settings, monkeypatch):
    with pytest.raises(UserError, match="optim is 'adam'; choose one of adamw, adamw_8bit, paged_adamw_8bit"):
        SFTConfig(optim="adam")
    with pytest.raises(
        UserError, match="paged_adamw_8bit pages between GPU and host memory, and this is a cpu; take adamw_8bit"
    ):
        trainer(make_model(), tokenizer, settings, optim="paged_adamw_8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="optim: adamw_8bit needs bitsandbytes"):
        trainer(make_model(), tokenizer, settings, optim="adamw_8bit")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory and the fused kernel need a GPU")
@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit"])
def test_on_a_gpu_steps_are_those_of_adamw_too(name):
    parameter = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
    gradient = torch.randn_like(parameter) + 1
    want = adam(parameter.detach(), [gradient], 1e-2, 0.1)
    optimizer = build_optimizer(name, [parameter], 1e-2, 0.1)
    parameter.grad = gradient
    optimizer.step()
    assert (parameter.double() - want).abs().median() < 2e-3
