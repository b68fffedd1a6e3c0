"""People to policy: rankings clicked on the page train a reward model that drives PPO, with the README's own commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from rlhf_fast.cli import main
from rlhf_fast.commands.label import _parser
from rlhf_fast.models.scratch import new_model
from rlhf_fast.run.metrics import read_metrics
from tests.feedback.people.conftest import Served

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
# the README's commands are for a real model; here two layers learn for a moment
QUICK = {
    "reward": ["--max_steps", "25", "--learning_rate", "3e-3", "--per_device_train_batch_size", "8"],
    "ppo": ["--max_steps", "2", "--per_device_train_batch_size", "8", "--max_completion_length", "6"],
}


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rankings_clicked_on_the_page_end_in_a_ppo_run(browser, tab, tmp_path, monkeypatch):
    """The person prefers short responses. The reward model learns that from the rankings, and PPO runs against it."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"<!-- people -->\n```bash\n(.*?)```", README, re.DOTALL)[1]
    label, export, reward, ppo = (shlex.split(line)[1:] for line in block.splitlines())
    sums = [f"{a}+{b}=" for a in range(1, 4) for b in range(1, 5)]
    write("my_prompts.jsonl", [{"prompt": text} for text in sums])
    write("corpus.jsonl", [{"text": text + "1" * (i % 9)} for i, text in enumerate(sums * 9)])
    new_model("nano", "corpus.jsonl", "runs/sft", vocab_size=300, quiet=True)

    options = _parser().parse_args(label[1:])  # the first command, but for its page
    written = ["generate", options.model, "--prompts", options.prompts, "--n", str(options.num_responses)]
    assert main([*written, "-o", "people.responses.jsonl", "--max_new_tokens", "6", "--temperature", "1.2"]) == 0
    responses: dict[str, list[str]] = {}
    for row in read("people.responses.jsonl"):
        responses.setdefault(row["prompt"], []).append(row["completion"])
    rows = [{"prompt": prompt, "responses": texts} for prompt, texts in responses.items()]
    served = Served([row for row in rows if len(set(row["responses"])) > 1], Path(options.output)).start()
    page = tab(served)
    for _ in range(len(served.items)):
        shown = page.shown()
        order = sorted(range(len(shown)), key=lambda i: (len(shown[i]), shown[i]))
        page.press(*("abcdefgh"[i] for i in order), "Enter") if len(shown) > 2 else page.press("17"[order[0]])
    assert page.page.locator("#end-title").text_content() == "All done"
    page.context.close()
    served.stop()

    assert main(export) == 0
    ranked = read("ranked.jsonl")
    assert len(ranked) == len(served.items)
    assert all(row["responses"] == sorted(row["responses"], key=lambda text: (len(text), text)) for row in ranked)
    assert main([*reward, "--quiet", "--logging_steps", "1", *QUICK["reward"]]) == 0
    accuracy = [row["accuracy"] for row in read_metrics("runs/reward") if "accuracy" in row]
    assert sum(accuracy[-5:]) / 5 > 0.8 > accuracy[0]
    assert main([*ppo, "--quiet", "--logging_steps", "1", *QUICK["ppo"]]) == 0
    steps = read_metrics("runs/ppo")
    assert [row["step"] for row in steps] == [1, 2]
    assert {"rewards/reward_model/mean", "objective/scores", "loss/policy_avg"} <= {key for row in steps for key in row}
    assert main(["generate", "runs/ppo", "--prompt", "1+2=", "--max_new_tokens", "2"]) == 0
