"""Supervised fine-tuning: its loss is transformers' own token cross entropy, of the completions alone."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf_fast import SFTConfig, SFTTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import lora_config

ROWS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "12+30=", "completion": "42"},
    {"prompt": "say ", "completion": "hello, world"},
    {"prompt": "a", "completion": "b c"},
    {"prompt": "what is pi ", "completion": "3.14159"},
]


def tokens(row, ids):
    return ids(row["prompt"]), ids(row["completion"], end=True)


@pytest.fixture
def trainer(tokenizer, settings):
    def make(model, rows=ROWS, eval_rows=None, **more):
        args = SFTConfig(**settings(max_length=64, per_device_train_batch_size=8, **more))
        return SFTTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)

    return make


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_cross_entropy_of_completion_tokens(packing, trainer, model, plain, ids, run):
    """And the completion ends with a trained <eos>; packed and one row at a time alike."""
    logprobs = torch.cat([plain(copy.deepcopy(model), *tokens(row, ids)) for row in ROWS])
    got = run(trainer(model, packing=packing)).losses[0]
    assert len(logprobs) == sum(len(row["completion"]) + 1 for row in ROWS)
    assert got == pytest.approx(float(-logprobs.detach().double().mean()), abs=1e-5)


def test_the_step_is_that_of_plain_transformers(sgd, trainer, model, plain, ids, run):
    twin = copy.deepcopy(model)
    loss = -torch.cat([plain(twin, *tokens(row, ids)) for row in ROWS]).mean()
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    result = run(trainer(model, max_grad_norm=0.5))
    assert result.steps[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.5
    for (name, parameter), grad in zip(twin.named_parameters(), grads):
        want = parameter - 0.1 * grad * 0.5 / norm
        torch.testing.assert_close(result.weights[f"model.{name}"], want, atol=1e-6, rtol=1e-5, msg=name)


def test_prompts_are_trained_only_on_request(trainer, model, plain, ids, run):
    twin = copy.deepcopy(model)
    whole = [[*p, *c] for p, c in (tokens(row, ids) for row in ROWS)]
    want = -torch.cat([plain(twin, w[:1], w[1:]) for w in whole]).mean()
    got = run(trainer(model, completion_only_loss=False)).losses[0]
    assert got == pytest.approx(float(want.detach()), abs=1e-5)


def test_in_conversations_the_assistant_is_trained_unless_all_is_asked_for(trainer, make_model, run, tokenizer):
    """Three turns; which tokens, is tested with the chat templates."""
    rows = [{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}]
    assistant, everyone = (trainer(make_model(), rows, assistant_only_loss=only) for only in (True, False))
    mask = assistant.train_records[0][0].response_mask
    assert tokenizer.decode([t for t, m in zip(assistant.train_records[0][0].input_ids, mask) if m]).strip() == "2<eos>"
    assert sum(everyone.train_records[0][0].response_mask) == len(mask) - 1
    assert run(assistant).losses != run(everyone).losses


def test_weights_scale_tokens_and_their_share_of_the_mean(trainer, model, plain, ids, run):
    weights = [2.0, 0.0, 0.25, 1.0, 0.5]
    twin = copy.deepcopy(model)
    logprobs = [plain(twin, *tokens(row, ids)) for row in ROWS]
    total = sum(w * len(l) for w, l in zip(weights, logprobs))
    want = -sum(w * l.sum() for w, l in zip(weights, logprobs)) / total
    got = run(trainer(model, [{**row, "weight": w} for row, w in zip(ROWS, weights)])).losses[0]
    assert got == pytest.approx(float(want.detach()), abs=1e-5)


def test_tiny_weights_do_not_shrink_the_loss(trainer, make_model, run):
    light = [{**row, "weight": 1e-3} for row in ROWS]
    assert run(trainer(make_model(), light)).losses == pytest.approx(run(trainer(make_model())).losses, abs=1e-5)


def test_dft_weighs_each_token_by_its_probability(sgd, trainer, model, plain, ids, run):
    """arXiv:2508.05629: loss and step beside plain PyTorch; the weight is a constant, it has no gradient."""
    twin = copy.deepcopy(model)
    logprobs = torch.cat([plain(twin, *tokens(row, ids)) for row in ROWS])
    loss = -(logprobs.detach().exp() * logprobs).mean()
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    result = run(trainer(model, loss_type="dft", max_grad_norm=0.0))
    assert result.losses[0] == pytest.approx(float(loss.detach()), abs=1e-6)
    for (name, parameter), grad in zip(twin.named_parameters(), grads):
        torch.testing.assert_close(result.weights[f"model.{name}"], parameter - 0.1 * grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_neftune_disturbs_training_and_neither_evaluation_nor_what_shares_the_base(
    lora, tokenizer, make_model, settings, run
):
    """What the first layer reads: noise in the training pass, of another draw each step, and none afterwards."""
    sizes = {"max_length": 64, "per_device_train_batch_size": 1, "num_train_epochs": 2}
    args = SFTConfig(**settings(**sizes, neftune_noise_alpha=5.0, learning_rate=1e-9))
    peft = lora_config(r=4, alpha=8) if lora else None
    data = {"train_dataset": ROWS, "eval_dataset": ROWS}
    made = SFTTrainer(make_model(), args, processing_class=tokenizer, peft_config=peft, **data)
    seen, body = [], made.policy.model.get_decoder()
    body.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    clean = make_model().get_input_embeddings().weight.detach()
    run(made)
    ids = torch.tensor([t for e in made.train_records[0] for t in e.input_ids])
    first, second = ((x[0] - clean[ids]).abs() for x in seen[:2])
    assert 0.1 < float(first.max()) < 5 / (3 * 32) ** 0.5  # the shortest example has three tokens
    assert not torch.equal(first, second)
    del seen[:]
    made.evaluate()
    assert torch.allclose(seen[0][0], clean[ids], atol=1e-6)


def test_settings_of_the_loss_and_the_noise_are_checked():
    with pytest.raises(UserError, match="loss_type is 'ntp'; choose one of nll, dft"):
        SFTConfig(loss_type="ntp")
    with pytest.raises(UserError, match="neftune_noise_alpha is 0; it must be above 0, or unset"):
        SFTConfig(neftune_noise_alpha=0)


def test_accuracy_entropy_and_evaluation_are_those_of_the_logits(trainer, model, plain, ids, run):
    """An evaluation is over all rows whatever the batch size."""
    twin = copy.deepcopy(model)
    rights, entropies, logprobs = [], [], []
    for row in ROWS:
        prompt, response = tokens(row, ids)
        logprobs.append(plain(twin, prompt, response))
        logits = twin(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        rights.append(logits.argmax(-1) == torch.tensor(response))
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    made = trainer(model, eval_rows=ROWS, packing=False)
    made.args.per_device_train_batch_size = 2
    figures = made.evaluate()
    assert figures["eval_mean_token_accuracy"] == pytest.approx(float(torch.cat(rights).float().mean()), abs=1e-6)
    assert figures["eval_entropy"] == pytest.approx(float(torch.cat(entropies).detach().mean()), abs=1e-5)
    assert figures["eval_loss"] == pytest.approx(float(-torch.cat(logprobs).detach().mean()), abs=1e-5)
    made.args.per_device_train_batch_size = 8
    step = run(made).steps[0]
    assert step["mean_token_accuracy"] == pytest.approx(figures["eval_mean_token_accuracy"], abs=1e-6)
    assert step["entropy"] == pytest.approx(figures["eval_entropy"], abs=1e-5)


def test_a_few_steps_learn_the_rows_by_heart(tokenizer, model, settings, run):
    args = SFTConfig(**settings(learning_rate=1e-2, max_steps=40, max_length=64, gradient_checkpointing=True))
    result = run(SFTTrainer(model, args, train_dataset=ROWS, processing_class=tokenizer))
    assert result.losses[0] > 1.0
    assert result.losses[-1] < 0.05
    assert result.steps[-1]["mean_token_accuracy"] == 1.0
