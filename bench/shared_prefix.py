"""An update step with the prompt computed once for all its responses, against the same step without.

    python -m bench.shared_prefix [CASE ...] [--rounds 5] [--threads 2]

Both sides are the project's own trainers and differ in ``shared_prefix`` alone: pack, forward, loss, backward, clip, AdamW
(learning rate 0, so that every step is the same one). The model has random weights and the proportions of Qwen2.5-7B: wide
MLPs, few key heads, a head that is small beside the body. Before anything is timed, the gradients of both sides are compared
on the very batch that is timed. The two take turns, each round starting with the other one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bench.report import machine, put_rows, version
from rlhf_fast import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from rlhf_fast.data.batch import Example, Experience, Preference, packed_length
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.trainers.loop import optimizer_step

RESULTS = Path(__file__).parent / "results"
VOCAB = 4096
MODEL = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "vocab_size": VOCAB, "tie_word_embeddings": False}
LARGEST_DIFFERENCE = 1e-4  # of gradients, relative to the largest; float32 sums of 10,240 tokens in another order
COLUMNS = ("case", "sharing", "tokens", "median_s", "min_s", "max_s", "median_cpu_s", "rounds", "ratio", "cpu_ratio")
COLUMNS += ("token_ratio", "gradient_difference", "machine", "threads", "date", "versions")


@dataclass(frozen=True)
class Case:
    """One update step: ``responses`` of ``completion`` tokens to one prompt."""

    trainer: type
    prompt: int
    completion: int
    responses: int
    lora: bool = False
    target: float | None = None  # the least ratio that we promise


CASES = {
    "grpo": Case(GRPOTrainer, 1024, 256, 8, target=2.0),
    "dpo": Case(DPOTrainer, 1024, 256, 2, target=1.4),
    "grpo-lora": Case(GRPOTrainer, 1024, 256, 8, lora=True),
    "dpo-lora": Case(DPOTrainer, 1024, 256, 2, lora=True),
    # where sharing gains little: 1.31 by the formula, just above its threshold
    "grpo-short-prompt": Case(GRPOTrainer, 96, 256, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.out / f"shared-prefix-{device}.csv"
    for name in args.cases or CASES:
        rows = measure(name, CASES[name], args.rounds)
        shared = rows[-1]
        print(f"{name}: {shared['ratio']:.2f} times as fast, {shared['token_ratio']:.2f} by the formula")
        path.with_suffix(".md").write_text(markdown(write(path, rows)))


def build(case: Case, folder: str) -> tuple[Any, list[Any]]:
    """The trainer and the records of its one window."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w0")
    settings = {"output_dir": folder, "quiet": True, "learning_rate": 0.0, "max_steps": 1000, "logging_steps": 1000}
    settings |= {"gradient_checkpointing": False, "per_device_train_batch_size": case.responses}
    common = {"processing_class": tokenizer, "peft_config": lora_config(r=16) if case.lora else None}
    model = Qwen2ForCausalLM(Qwen2Config(**MODEL))
    prompt = torch.randint(2, VOCAB, (case.prompt,)).tolist()
    examples = [
        Example(
            [*prompt, *torch.randint(2, VOCAB, (case.completion,)).tolist()],
            [False] * case.prompt + [True] * case.completion,
        )
        for _ in range(case.responses)
    ]
    if case.trainer is DPOTrainer:
        pair = [{"prompt": "w2 ", "chosen": "w3", "rejected": "w4"}]
        trainer = DPOTrainer(model, DPOConfig(**settings), train_dataset=pair, **common)
        return trainer, [Preference(examples, ref_logprobs=[-2000.0, -2001.0])]
    args = GRPOConfig(num_generations=case.responses, max_completion_length=case.completion, **settings)
    trainer = GRPOTrainer(model, "random", args=args, train_dataset=[{"prompt": "w2"}], **common)
    advantages = torch.linspace(-1.5, 1.5, case.responses, device=trainer.policy.device)
    return trainer, [Experience(e, 0.0, advantages=a.expand(len(e))) for e, a in zip(examples, advantages)]


def measure(name: str, case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row without sharing and one with."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, records = build(case, folder)
    trainer.policy.train()
    trainer.records = records
    examples = records[0].responses if case.trainer is DPOTrainer else [r.example for r in records]
    plain, shared = (gradients(trainer, records, sharing) for sharing in (False, True))
    largest = max(float(g.abs().max()) for g in plain)
    difference = max(float((a - b).abs().max()) for a, b in zip(plain, shared)) / largest
    if not difference <= LARGEST_DIFFERENCE:
        raise SystemExit(f"{name}: gradients differ by {difference:.1e} of the largest; nothing is timed")
    del plain, shared
    wall: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds):
        for sharing in (False, True) if turn % 2 else (True, False):
            trainer.args.shared_prefix = sharing
            began = time.perf_counter(), time.process_time()
            optimizer_step(trainer, list(range(len(records))))
            if trainer.policy.device.type == "cuda":
                torch.cuda.synchronize()
            wall[sharing].append(time.perf_counter() - began[0])
            cpu[sharing].append(time.process_time() - began[1])
    tokens = {sharing: packed_length(examples, sharing) for sharing in (False, True)}
    return [
        {
            "case": name,
            "sharing": "on" if sharing else "off",
            "tokens": tokens[sharing],
            "median_s": statistics.median(wall[sharing]),
            "min_s": min(wall[sharing]),
            "max_s": max(wall[sharing]),
            "median_cpu_s": statistics.median(cpu[sharing]),
            "rounds": rounds,
            "ratio": statistics.median(a / b for a, b in zip(wall[False], wall[sharing])),
            "cpu_ratio": statistics.median(a / b for a, b in zip(cpu[False], cpu[sharing])),
            "token_ratio": tokens[False] / tokens[sharing],
            "gradient_difference": difference if sharing else 0.0,
            "machine": machine(trainer.policy.device.type),
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": " ".join(f"{p}={version(p)}" for p in ("torch", "transformers", "peft")),
        }
        for sharing in (False, True)
    ]


def gradients(trainer: Any, records: list[Any], sharing: bool) -> list[torch.Tensor]:
    """The gradient of every trained parameter."""
    trainer.args.shared_prefix = sharing
    trainer.optimizer.zero_grad(set_to_none=True)
    (loss, _, _), *_ = trainer.losses(records, trainer.window(records))
    loss.backward()
    found = [p.grad for p in trainer.parameters]
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Put the rows of a case into the file; returns all that it holds."""
    rounded = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return put_rows(path, rounded, ("case", "sharing"), COLUMNS)


def markdown(rows: list[dict[str, str]]) -> str:
    """The table, and what was run."""
    first = rows[0]
    lines = [
        "# One prompt, many responses",
        "",
        "An update step (pack, forward, loss, backward, clip, AdamW) of the project's own trainers with `shared_prefix` on",
        "and off, float32, no checkpointing: `python -m bench.shared_prefix`.",
        f"Qwen2 architecture, random weights: {', '.join(f'{k} {v}' for k, v in MODEL.items())}.",
        "",
        f"{first['machine']}, {first['threads']} thread(s), {first['versions']}, {first['date']}. The sides take turns;",
        f"*ratio* is the median over {first['rounds']} rounds of time without over time with",
        "sharing, *CPU ratio* the same of the process's CPU seconds. *formula* is G (P + C) / (P + G C), the ratio of tokens.",
        "",
        "| case | P, C, G | tokens off, on | seconds off, on | ratio | CPU ratio | formula | target | gradients differ by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for off, on in zip(rows[::2], rows[1::2]):
        case = CASES[on["case"]]
        lines.append(
            f"| {on['case']} | {case.prompt}, {case.completion}, {case.responses} | {off['tokens']}, {on['tokens']} "
            f"| {off['median_s']}, {on['median_s']} | {on['ratio']} | {on['cpu_ratio']} | {on['token_ratio']} "
            f"| {f'≥ {case.target}' if case.target else ''} | {on['gradient_difference']} of the largest |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
