"""Does a constitution reach the policy? SFT on revised answers against SFT on the originals, on a principle that can be counted.

    python -m bench.constitution [--seeds 3] [-o DIR]

The principle: never say "obviously". A small model from scratch learns from people who say it in most answers (60%); it
answers training prompts; ``rlhf-fast constitution`` has each answer criticised and rewritten; SFT of the same model goes on with what
comes out. The critic is a script behind a real HTTP server (it finds the word and leaves it out), because no model that
could play it can be downloaded here: what is measured is the road, not a critic. The control goes on with the original
answers, for as many steps. Measured on prompts never trained on, sampled at temperature 1: the share of answers that break
the principle, and of those that still name the thing asked about, so that silence would not pass for virtue.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.scripted import ScriptedServer
from rlhf_fast.cli import main as rlhf_fast
from rlhf_fast.data.prepare import prepare_prompts
from rlhf_fast.data.sources import write_jsonl
from rlhf_fast.models import load
from rlhf_fast.models.scratch import new_model
from rlhf_fast.rewards import evaluate_policy
from rlhf_fast.run.metrics import print_table
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

WORD = "obviously"
SHARE = 0.6  # of people's answers that say it
KINDS = ["red", "small", "old", "quiet", "warm", "heavy", "plain", "bright"]
THINGS = [
    "apple",
    "boat",
    "candle",
    "door",
    "engine",
    "flute",
    "glove",
    "hammer",
    "island",
    "jar",
    "kite",
    "lamp",
    "mirror",
]
THINGS += ["needle", "oven", "piano", "quilt", "rope", "spoon", "table", "umbrella", "violin", "window", "yard"]
ENDS = ["useful at home", "good to have", "nice to look at", "easy to find"]
CONSTITUTION = f"""\
critique_request: "Criticise your last response. {{critique}}"
revision_request: "Rewrite your last response. {{revision}}"
principles:
  - name: modesty
    critique: Does it say "{WORD}"?
    revision: Leave out "{WORD}".
"""


def people(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Demonstrations on three quarters of the prompts, and the others without answers."""
    draw = random.Random(seed)
    prompts = [(kind, thing) for kind in KINDS for thing in THINGS]
    draw.shuffle(prompts)
    rows = []
    for kind, thing in prompts:
        word = f"{WORD} " if draw.random() < SHARE else ""
        answer = f" A {kind} {thing} is {word}{draw.choice(ENDS)}."
        rows.append({"prompt": f"What is a {kind} {thing}?", "completion": answer, "thing": thing})
    cut = len(rows) * 3 // 4
    return rows[:cut], [{"prompt": r["prompt"], "thing": r["thing"]} for r in rows[cut:]]


def critic(messages: list[dict[str, Any]]) -> str:
    """Plays the model that criticises and rewrites."""
    response = messages[1]["content"]
    if len(messages) == 3:
        return f'It says "{WORD}".' if WORD in response else "Nothing goes against it."
    return re.sub(rf"\b{WORD} ?", "", response)


def breaks(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer that breaks the principle."""
    return [float(WORD in completion) for completion in completions]


def on_topic(completions: Sequence[str], thing: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer that names the thing asked about."""
    return [float(name in completion) for completion, name in zip(completions, thing)]


def measured(model: str | Path, rows: list[dict[str, str]], samples: int) -> dict[str, float]:
    """Shares of sampled answers that break the principle, and that stay on topic."""
    policy = load(model)
    prompts, _ = prepare_prompts(rows, policy.tokenizer)
    result = evaluate_policy(policy, prompts, [breaks, on_topic], n=samples, temperature=1.0, max_new_tokens=40)
    return {"violations": result["rewards/breaks/mean"], "on topic": result["rewards/on_topic/mean"]}


def sft(model: Path, data: Any, out: Path, steps: int, learning_rate: float, seed: int) -> Path:
    config = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=1,  # of packed rows, about 40 answers each
        gradient_checkpointing=False,
        logging_steps=50,
        save_steps=1_000_000,
        quiet=True,
        seed=seed,
    )
    SFTTrainer(str(model), args=config, train_dataset=data).train()
    return out


def one_seed(folder: Path, seed: int, steps: int = 300, more_steps: int = 60, samples: int = 8) -> dict[str, Any]:
    """The whole road once: stage -> shares."""
    train, held_out = people(seed)
    write_jsonl(train, folder / "people.jsonl")
    write_jsonl([{"prompt": r["prompt"], "thing": r["thing"]} for r in train], folder / "prompts.jsonl")
    (folder / "modesty.yaml").write_text(CONSTITUTION)
    base = new_model("nano", folder / "people.jsonl", folder / "base", seed=seed, quiet=True)
    before = sft(base, train, folder / "before", steps, 3e-3, seed)
    sampling = ["--temperature", "1", "--seed", str(seed), "--max_new_tokens", "40"]
    answers = folder / "answers.jsonl"
    _run(["generate", before, "--prompts", folder / "prompts.jsonl", "-o", answers, *sampling])
    with ScriptedServer(critic) as server:
        constitution = ["--constitution", folder / "modesty.yaml", "--rounds", "1"]
        _run(["constitution", answers, "-o", folder / "revised", "--url", server.url, *constitution])
    report = json.loads((folder / "revised" / "chain.report.json").read_text())["figures"]
    after = sft(before, str(folder / "revised" / "sft.jsonl"), folder / "after", more_steps, 1e-3, seed)
    control = sft(before, str(answers), folder / "control", more_steps, 1e-3, seed)
    return {
        "revised": report["finished/changed"] / report["prompts"],
        "before": measured(before, held_out, samples),
        "control: SFT on its own answers": measured(control, held_out, samples),
        "SFT on the revised answers": measured(after, held_out, samples),
    }


def _run(argv: Sequence[Any]) -> None:
    """A command of the command line, as a user would give it."""
    if code := rlhf_fast([str(word) for word in argv]):
        sys.exit(code)


def table(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Stage, violations and on-topic answers as mean and standard error over seeds, and each seed's violations."""
    rows = []
    for stage in list(results[0])[1:]:
        cells = []
        for name in ("violations", "on topic"):
            values = [result[stage][name] for result in results]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append(f"{statistics.mean(values):.1%} ± {error:.1%}")
        rows.append((stage, *cells, ", ".join(f"{result[stage]['violations']:.1%}" for result in results)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", help="keep models and data here; a temporary folder when not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = []
        for seed in range(args.seeds):
            folder = Path(args.output or temporary) / f"seed{seed}"
            folder.mkdir(parents=True)
            results.append(one_seed(folder, seed))
    header = ("stage", "violations", "on topic", "violations, each seed")
    print_table("never say it", table(results), header)
    print("\n| " + " | ".join(header) + " |\n|---|---|---|---|")
    for row in table(results):
        print("| " + " | ".join(row) + " |")
    revised = statistics.mean(result["revised"] for result in results)
    print(
        f"\nanswers that the revision changed: {revised:.1%}; torch {torch.__version__}, {torch.get_num_threads()} threads of a CPU"
    )


if __name__ == "__main__":
    main()
