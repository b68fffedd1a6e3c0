"""TRL's own trainers, run on a tiny model as they are and on these kernels: same losses, metrics and weights."""

from __future__ import annotations

import math
import string
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlhf_fast.errors import UserError

trl = pytest.importorskip("trl", reason="TRL is one of the peers: pip install -e '.[peers]'")

import rlhf_fast.integrations.trl as fast
from rlhf_fast.kernels import linear_logprobs

pytestmark = pytest.mark.filterwarnings("ignore")
VOCAB = ["<eos>", "<unk>", *string.ascii_lowercase, "+", "="]
TIMES = ("time", "runtime", "per_second", "flos", "loss_scale")  # what no two runs share


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False, **special)


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}
    tokens = {"vocab_size": len(VOCAB), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **tokens, tie_word_embeddings=False))


def length_reward(completions, **_):
    return [len(c) + c.count("a") for c in completions]


def run(kind: str, tokenizer, tmp_path, base=None, frozen_head: bool = False, lora: bool = False, **options):
    """Two optimiser steps of one of TRL's trainers; returns its log, without times, and the trained weights."""
    from datasets import Dataset

    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    rows = {
        "SFT": {"prompt": ["ab=", "c=", "de="] * 4, "completion": ["ab", "ccc", "e"] * 4},
        "DPO": {"prompt": ["ab=", "c="] * 4, "chosen": ["ab", "ccc"] * 4, "rejected": ["x", "yz"] * 4},
        "GRPO": {"prompt": ["ab=", "c="] * 8},
    }[kind]
    options = {"beta": 0.1, "max_completion_length": 6, "num_generations": 4} | options if kind == "GRPO" else options
    quiet = {"use_cpu": True, "bf16": False, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    quiet |= {"gradient_checkpointing": False, "disable_tqdm": True, "seed": 3}
    args = config(
        output_dir=str(tmp_path / "out"),
        **quiet,
        **{"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05, "optim": "sgd", **options},
    )
    tiny_model().save_pretrained(tmp_path / "model")  # DPO and GRPO load the reference from where the policy came from
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "model")
    model.lm_head.requires_grad_(not frozen_head)
    extra = {"reward_funcs": length_reward} if kind == "GRPO" else {}
    if lora:
        from peft import LoraConfig

        torch.manual_seed(2)
        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    run = (base or trainer)(
        model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer, **extra
    )
    run.train()
    log = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in run.state.log_history]
    return log, {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_same_run(ours, theirs):
    (our_log, our_weights), (their_log, their_weights) = ours, theirs
    assert [list(row) for row in our_log] == [list(row) for row in their_log]
    for our_row, their_row in zip(our_log, their_log):
        for name, value in their_row.items():
            assert our_row[name] == pytest.approx(value, rel=1e-4, abs=2e-6, nan_ok=True), name
    # plain gradient descent: equal weights are equal gradients
    torch.testing.assert_close(our_weights, their_weights, rtol=1e-5, atol=1e-6)


CASES = [
    ("SFT", {}),
    ("DPO", {"loss_type": "sigmoid", "use_weighting": True}),
    ("GRPO", {"temperature": 0.7}),
    ("GRPO", {"entropy_coef": 0.1}),
]


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("kind, options", CASES, ids=["SFT", "weighted DPO", "GRPO", "GRPO with an entropy term"])
def test_a_patched_trainer_takes_the_same_steps(kind, options, frozen_head, tokenizer, tmp_path, monkeypatch):
    theirs = run(kind, tokenizer, tmp_path, frozen_head=frozen_head, **options)
    calls = []
    monkeypatch.setattr(fast, "linear_logprobs", lambda *a, **k: calls.append(a) or linear_logprobs(*a, **k))
    with fast.patched():
        ours = run(kind, tokenizer, tmp_path, frozen_head=frozen_head, **options)
    assert calls
    assert_same_run(ours, theirs)
    assert any(abs(row.get("loss", 0.0)) > 1e-6 for row in theirs[0])


def test_a_patched_trainer_of_adapters_takes_the_same_steps(tokenizer, tmp_path):
    """LoRA, whose frozen head is what the two GEMMs are for; the reference is the model without its adapter."""
    theirs = run("GRPO", tokenizer, tmp_path, lora=True)
    with fast.patched():
        ours = run("GRPO", tokenizer, tmp_path, lora=True)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("options", [{"loss_type": "grpo", "num_iterations": 2}, {"gradient_accumulation_steps": 2}])
def test_fused_grpo_trains_like_trl(options, tokenizer, tmp_path):
    options = {"max_steps": 4, "learning_rate": 0.3, **options}
    assert_same_run(
        run("GRPO", tokenizer, tmp_path, base=FastGRPO, **options), run("GRPO", tokenizer, tmp_path, **options)
    )


PLAIN_KL = {"use_bias_correction_kl": False}
LOSSES = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", **PLAIN_KL},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", **PLAIN_KL},
    {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
    {"loss_type": "dapo", "epsilon_high": 0.28, **PLAIN_KL},
    {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.1},
    {"loss_type": "dr_grpo", "beta": 0.0},
    {"loss_type": "bnpo", "importance_sampling_level": "sequence"},
    {"loss_type": "cispo", "epsilon_high": 1.3},
    {"loss_type": "sapo"},
    {"loss_type": "grpo", "entropy_coef": 0.1},
    {"loss_type": "grpo", "top_entropy_quantile": 0.5},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.3},
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(map(str, o.values())))
def test_fused_grpo_has_the_loss_gradient_and_metrics_of_trl(options, training, tokenizer, tmp_path):
    """Losses that ``policy_loss`` knows, and some that fall back on TRL's, far off-policy so that every clip acts."""
    from datasets import Dataset

    torch.manual_seed(5)
    shape = (5, 7)
    inputs = {"prompt_ids": torch.randint(2, 20, (5, 3)), "prompt_mask": torch.ones(5, 3, dtype=torch.long)}
    inputs |= {"completion_ids": torch.randint(2, 20, shape), "advantages": torch.tensor([1.0, -1.5, 0.5, -0.3, -0.8])}
    # a long one, one with a tool's output inside, a short one, one that was truncated and is masked altogether
    inputs["completion_mask"] = (torch.arange(7) < torch.tensor([7, 6, 2, 0, 5])[:, None]).long()
    inputs["tool_mask"] = torch.ones(shape, dtype=torch.long).index_put(
        (torch.tensor([1]), torch.tensor([2])), torch.tensor(0)
    )
    inputs["num_items_in_batch"] = torch.tensor(31.0)
    results = []
    for trainer in (trl.GRPOTrainer, FastGRPO):
        model = tiny_model()
        with torch.no_grad():
            logits = model(torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)).logits[:, 2:-1]
            now = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(6))
        drift = torch.tensor([-0.6, 0.5, 0.1, 0.0, -0.7])[:, None]  # whole sequences pass the clips too
        inputs |= {"old_per_token_logps": now + 0.4 * noise[0] + drift, "ref_per_token_logps": now + noise[1]}
        model.save_pretrained(tmp_path / "model")
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "model")
        settings = {"beta": 0.1, "num_generations": 4, "per_device_train_batch_size": 4, **options}
        args = trl.GRPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, **settings
        )
        rows = Dataset.from_dict({"prompt": ["a"] * 4})
        host = trainer(model, length_reward, args=args, train_dataset=rows, processing_class=tokenizer)
        host.current_gradient_accumulation_steps = 2
        host.model.train(training)
        loss = host.compute_loss(host.model, inputs)
        loss.backward()
        mode = "train" if training else "eval"
        results.append(
            (
                loss.detach(),
                [p.grad for p in host.model.parameters()],
                {k: v[0] for k, v in host._metrics[mode].items()},
            )
        )
    (their_loss, their_grads, their_metrics), (loss, grads, metrics) = results
    torch.testing.assert_close((loss, grads), (their_loss, their_grads), rtol=1e-4, atol=1e-6)
    assert list(metrics) == list(their_metrics)
    assert metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-6, nan_ok=True)


class FastGRPO(fast.FusedGRPO, trl.GRPOTrainer):
    pass


def test_metrics_stay_on_the_device_until_they_are_logged(monkeypatch):
    """One transfer for all; what TRL put there as numbers stays as it is."""
    logged = []
    monkeypatch.setattr(trl.GRPOTrainer, "log", lambda self, logs: logged.append({**self._metrics["train"]}))
    host = object.__new__(FastGRPO)
    host.model = torch.nn.Linear(1, 1)
    host._metrics = {"train": {"kl": [torch.tensor(0.5), torch.tensor(float("nan"))], "reward": [2.0]}, "eval": {}}
    host.log({})
    assert logged[0]["reward"] == [2.0] and logged[0]["kl"][0] == 0.5 and math.isnan(logged[0]["kl"][1])
    assert all(type(x) is float for x in logged[0]["kl"])


def test_every_field_of_the_head_equals_trls(tmp_path):
    """Softcap, logit scale, bias and temperature, on rows that are sure, unsure and torn; first derivatives too."""
    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction
    torch.manual_seed(0)
    hidden = torch.randn(64, 16) * torch.logspace(-2, 1, 64)[:, None]
    weight, bias, targets = torch.randn(50, 16), torch.randn(50), torch.randint(0, 50, (64,))
    targets[::2] = (hidden @ weight.T + bias)[::2].argmax(-1)
    for softcap in (None, 20.0):
        results = []
        for head in (original, fast._FusedHead(original, False), fast._FusedHead(original, True)):
            inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            fields = head.apply(*inputs, targets, 0.8, 32, softcap, 0.5)
            (fields[0].sum() + 0.3 * fields[1].square().sum()).backward()
            results.append((*(f.detach() for f in fields), *(x.grad for x in inputs)))
        for ours in results[1:]:
            assert ours[4].equal(results[0][4])
            torch.testing.assert_close(ours[:4] + ours[5:], results[0][:4] + results[0][5:], rtol=2e-4, atol=2e-4)


def test_autocast_reaches_the_head_and_both_gradients_of_it():
    """float32 parameters under bf16 autocast, backward outside of it as in accelerate; against float64."""
    from trl.trainer import utils

    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(32, 16), torch.randn(50, 16), torch.randint(0, 50, (32,))
    exact = [hidden.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()]
    log_p = (exact[0] @ exact[1].T).log_softmax(-1)
    ((log_p.exp() * log_p).sum() + log_p[range(32), targets].sum()).backward()
    for together in (False, True):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            head = fast._FusedHead(utils._ChunkedLogProbFunction, together)
            logprobs, entropy, *_ = head.apply(*inputs, None, targets, 1.0, 32, outputs=("entropy",))
        (logprobs.sum() - entropy.sum()).backward()
        for x, e in zip(inputs, exact):
            assert x.grad.dtype == torch.float32
            assert (x.grad - e.grad).norm() < 0.01 * e.grad.norm()


def test_the_frozen_head_is_multiplied_twice_and_the_entropy_for_logging_is_free(monkeypatch):
    from trl.trainer import utils

    sizes = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: sizes.append(a) or mm(*a, **k))
    head = fast._FusedHead(utils._ChunkedLogProbFunction, False)
    hidden = torch.randn(8, 4, requires_grad=True)
    logprobs, entropy, *_ = head.apply(hidden, torch.randn(9, 4), None, torch.arange(8), 1.0, 8, outputs=("entropy",))
    assert entropy.requires_grad
    logprobs.sum().backward()
    assert len(sizes) == 2


def test_functions_of_logits_are_replaced_where_they_were_imported_and_come_back():
    """ORPO's module binds the name at import; one imported while patched must come back too."""
    import trl.experimental.orpo.orpo_trainer as before
    from trl.trainer import utils

    originals = {name: getattr(utils, name) for name in fast._SIGNATURES}
    sys.modules.pop("trl.experimental.cpo.cpo_trainer", None)
    fast.patch()
    try:
        import trl.experimental.cpo.cpo_trainer as during

        assert before.selective_log_softmax is during.selective_log_softmax is fast._selective_log_softmax
        logits, index = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
        mask = torch.tensor([[1, 1, 0, 0, 1]] * 2)
        ours = [utils.selective_log_softmax(logits, index, 0.7, mask)]
        ours += utils.selective_log_softmax_and_entropy(logits, index, False, 0.7, mask)
        ours += [utils.entropy_from_logits(logits), utils.selective_log_softmax(logits, index[..., None])]
        assert not ours[2].requires_grad
    finally:
        fast.unpatch()
    theirs = [utils.selective_log_softmax(logits, index, 0.7, mask)]
    theirs += utils.selective_log_softmax_and_entropy(logits, index, False, 0.7, mask)
    theirs += [utils.entropy_from_logits(logits), utils.selective_log_softmax(logits, index[..., None])]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert originals == {name: getattr(utils, name) for name in fast._SIGNATURES}
    assert before.selective_log_softmax is during.selective_log_softmax is originals["selective_log_softmax"]


def test_blocks_nest_and_leave_what_they_found():
    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction
    fast.patch()
    outer = utils._ChunkedLogProbFunction
    with pytest.raises(KeyError), fast.patched(entropy_gradient=True):
        assert utils._ChunkedLogProbFunction.entropy_gradient
        raise KeyError
    assert utils._ChunkedLogProbFunction is outer
    fast.unpatch()
    assert utils._ChunkedLogProbFunction is original
    with fast.patched():
        assert utils._ChunkedLogProbFunction is not original
    assert utils._ChunkedLogProbFunction is original


def test_another_trl_is_refused_in_a_sentence_and_left_alone(monkeypatch):
    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction
    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits: None)
    with pytest.raises(UserError, match=r"entropy_from_logits takes \(logits\), but .* \(logits, chunk_size\)"):
        fast.patch()
    monkeypatch.delattr(utils, "entropy_from_logits")
    with pytest.raises(UserError, match=r"no trl.trainer.utils.entropy_from_logits"):
        fast.patch()
    assert utils._ChunkedLogProbFunction is original
    with pytest.raises(UserError, match="needs TRL's GRPOTrainer"):
        type("Alone", (fast.FusedGRPO,), {})


def test_without_trl_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer", None)
    with pytest.raises(UserError, match="pip install trl==1.16.0"):
        fast.patch()


def test_a_head_sharded_by_zero_3_stays_with_trl():
    from trl.trainer import utils

    weight = torch.randn(9, 4)
    weight.ds_id = 0
    called = []

    class Original(utils._ChunkedLogProbFunction):
        @classmethod
        def apply(cls, *args):
            called.append(args)

    fast._FusedHead(Original, False).apply(torch.randn(2, 4), weight, None, torch.arange(2), 1.0, 8)
    assert len(called) == 1
    assert linear_logprobs(torch.randn(2, 4), weight, torch.arange(2)).shape == (2,)
