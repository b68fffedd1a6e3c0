"""Constitutional AI's second half, with the README's own commands: answers, preferences by principles, a reward model, PPO."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from bench.scripted import ScriptedServer
from rlhf_fast.cli import main
from rlhf_fast.feedback.constitution import Constitution
from rlhf_fast.models.scratch import new_model
from rlhf_fast.run.metrics import read_metrics

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCK = re.search(r"<!-- rl-cai -->\n```bash\n(.*?)```", README, re.DOTALL)[1]
YAML = """\
critique_request: "{critique}"
revision_request: "{revision}"
principles:
  - {name: brevity, critique: Look for length., revision: Say less.}
  - {name: plainness, critique: Look for late letters., revision: Write early ones.}
"""
FAULTS = {"brevity": len, "plainness": lambda text: sum(map(ord, text))}  # fewer are better
QUICK = {
    "reward": ["--max_steps", "25", "--learning_rate", "3e-3", "--per_device_train_batch_size", "8"],
    "ppo": ["--max_steps", "2", "--per_device_train_batch_size", "8", "--max_completion_length", "6"],
}


def judge(messages):
    """Keeps to the one principle that it is shown."""
    text = messages[0]["content"]
    fault = FAULTS[re.search(r"The principle \((\w+)\)", text)[1]]
    (_, a), (_, b) = re.findall(r"<response (.)>\n(.*?)\n</response", text, re.DOTALL)
    return "[[A = B]]" if fault(a) == fault(b) else "[[A > B]]" if fault(a) < fault(b) else "[[B > A]]"


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model that was never trained, prompts, and two principles."""
    monkeypatch.chdir(tmp_path)
    sums = [f"{a}+{b}=" for a in range(1, 7) for b in range(1, 7)]
    Path("my_prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "topic": "sums"}) + "\n" for text in sums))
    Path("corpus.jsonl").write_text(
        "".join(json.dumps({"text": text + "19" * (i % 5)}) + "\n" for i, text in enumerate(sums))
    )
    Path("two.yaml").write_text(YAML)
    new_model("nano", "corpus.jsonl", "runs/sft-revised", vocab_size=300, quiet=True)
    return tmp_path


def test_answers_are_judged_by_a_principle_each_and_ppo_follows_what_was_learned_of_them(folder, capsys):
    asked, reward, ppo = (shlex.split(line.replace("7b-lora", "tiny"))[1:] for line in BLOCK.splitlines())
    asked[asked.index("default")] = "two.yaml"
    asked += ["--response_tokens", "6"]
    with ScriptedServer(judge) as server:
        asked[asked.index("--url") + 1] = server.url
        assert main(asked) == 0
        calls, rows = len(server.calls), read("principles.jsonl")
        assert main(asked) == 0 and len(server.calls) == calls and read("principles.jsonl") == rows
        assert "already holds the responses to 36 of 36 prompts" in capsys.readouterr().err
        assert main([*asked, "--seed", "1", "-o", "other.jsonl"]) == 0
    assert len(read("principles.responses.jsonl")) == 2 * 36
    named = {row["prompt"]: row["label_origin"]["principle"] for row in rows}
    assert set(named.values()) == set(FAULTS)
    constitution = next(iter({row["label_origin"]["constitution"] for row in rows}))
    assert re.fullmatch(r"two-[0-9a-f]{8}", constitution)
    for row in rows:
        fault = FAULTS[named[row["prompt"]]]
        assert fault(row["chosen"]) < fault(row["rejected"]) and row["topic"] == "sums" and "principle" not in row
    other = {row["prompt"]: row["label_origin"]["principle"] for row in read("other.jsonl")}
    assert any(named[prompt] != other[prompt] for prompt in named.keys() & other.keys()), "another seed, another draw"

    assert main([*reward, "--quiet", "--logging_steps", "1", *QUICK["reward"]]) == 0
    accuracy = [row["accuracy"] for row in read_metrics("runs/principles") if "accuracy" in row]
    assert sum(accuracy[-5:]) / 5 > 0.8 > accuracy[0]
    assert main([*ppo, "--quiet", "--logging_steps", "1", *QUICK["ppo"]]) == 0
    steps = read_metrics("runs/rl-cai")
    assert steps[-1]["step"] == 2 and {"rewards/reward_model/mean", "objective/scores"} <= {
        k for row in steps for k in row
    }


def test_the_draw_knows_prompt_responses_and_seed_and_nothing_else():
    import yaml

    constitution = Constitution.read(yaml.safe_load(YAML), "two.yaml")
    drawn = {seed: constitution.draw(["p", ["a", "b"]], 1, seed)[0].name for seed in range(20)}
    assert drawn == {seed: constitution.draw(["p", ["a", "b"]], 1, seed)[0].name for seed in range(20)}
    assert set(drawn.values()) == set(FAULTS)
    assert (
        "Look for length." in constitution.principles[0].question and "Say less." in constitution.principles[0].question
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--constitution", "two.yaml", "--rubric", "compare"], "rubric compare: has no {principle}"),
        (["--constitution", "nowhere.yaml"], "nowhere.yaml"),
        (["--policy", "runs/sft-revised", "--num_responses", "1"], "--num_responses of at least 2"),
        (["--policy", "runs/sft-revised", "--response_temperature", "0"], "--response_temperature above 0"),
        ([], "has prompts and nothing to compare; --policy"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(arguments, told, folder, capsys):
    assert main(["judge", "my_prompts.jsonl", "-o", "out.jsonl", "--url", "http://127.0.0.1:1", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not list(folder.glob("out*"))
