"""bench.learning: held-out rows stay held out, figures are what they are called, and a killed run goes on."""

from __future__ import annotations

import csv
import math
import re

import pytest
import torch

from bench.learning import __main__ as bench
from bench.learning.cells import Cell, cells
from bench.learning.checks import claims, mean_and_error
from bench.learning.curves import spread
from bench.learning.judge import in_order, preferred
from bench.learning.tasks import GAINS, TASKS
from rlhf_fast.data.tasks import quality
from rlhf_fast.rewards import resolve

SEED = 7


def operands(rows) -> set[frozenset]:
    return {frozenset(re.findall(r"\d+", row["prompt"])) for row in rows}


@pytest.mark.parametrize("task", ["addition", "preference"])
def test_no_held_out_sum_nor_its_mirror_image_is_trained(task):
    rows = TASKS[task](SEED)
    trained = rows.demonstrations + rows.prompts + rows.pairs + rows.rankings
    assert len(rows.held_out) >= 300
    assert not operands(trained) & operands(rows.held_out)
    assert [r["prompt"] for r in rows.held_out_rankings] in ([], [r["prompt"] for r in rows.held_out])


def test_a_held_out_story_has_numbers_of_its_own_and_is_worked_out_to_its_answer():
    """A third has one, two and three steps each; what is worked out line by line ends in what the story says."""

    def changes(row) -> tuple[int, ...]:
        start, *told = re.findall(r"(\w+) (?:away )?(\d+)", row["prompt"])
        return int(start[1]), *((1 if verb in GAINS else -1) * int(number) for verb, number in told)

    rows = TASKS["stories"](SEED)
    held_out = [changes(row) for row in rows.held_out]
    assert sorted(map(len, held_out)) == [2] * 100 + [3] * 100 + [4] * 100
    assert not set(held_out) & set(map(changes, rows.demonstrations + rows.prompts))
    assert all(sum(changes(row)) == int(row["answer"]) >= 0 for row in rows.held_out)
    for row in rows.demonstrations:
        steps = row["completion"].strip().split(", ")
        assert len(steps) == len(changes(row)) - 1
        assert all(eval(step.replace("=", "==")) for step in steps)
        assert resolve("answer")(completions=[row["completion"]], answer=[str(sum(changes(row)))]) == [1.0]


def test_one_label_in_ten_is_false():
    """Of a pair of responses with different hidden quality; held-out rankings have their qualities in order."""
    rows = TASKS["preference"](SEED)
    answers = {row["prompt"]: row["answer"] for row in rows.prompts}
    wrong = [
        quality(r["chosen"], answers[r["prompt"]]) < quality(r["rejected"], answers[r["prompt"]]) for r in rows.pairs
    ]
    assert 0.08 < sum(wrong) / len(wrong) < 0.12
    answers = {row["prompt"]: row["answer"] for row in rows.held_out}
    for row in rows.held_out_rankings:
        assert [quality(r, answers[row["prompt"]]) for r in row["responses"]] == [4, 3, 0]


def test_the_error_is_that_of_the_mean_over_seeds():
    """1, 2, 3: the standard deviation is 1, over the root of 3."""
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(mean_and_error([1.0])[1])


def test_a_tie_is_half_a_preference():
    """First prompt: 1 beats 0 twice, 0 ties with 0 twice: (2 + 1) / 4. Second: 0 against 1 loses everything."""
    mine, others = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert preferred(mine, others) == pytest.approx((0.75 + 0.0) / 2)
    assert preferred(mine, mine) == 0.5


def test_pairs_of_a_ranking_are_counted_once():
    """3 > 1 and 3 > 2 are in order, 1 > 2 is not; of the second row's pairs one is a tie, two are in order."""
    scores = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 1.0]])
    assert in_order(scores) == pytest.approx((2 + 2.5) / 6)


def test_names_that_touch_are_moved_apart_about_their_mean():
    assert spread([0.0, 1.0, 5.0], 2.0) == [-0.5, 1.5, 5.0]
    assert spread([0.0, 4.0], 2.0) == [0.0, 4.0]


def run(trainer: str, seed: int, first: float, last: float, variant: str = "", library: str = "rlhf_fast") -> dict:
    names = ("reward", "greedy accuracy", "preferred to SFT", "explained variance")
    points = [(n, name, value) for n, value in ((0, first), (9, last)) for name in names]
    where = {"task": "addition", "trainer": trainer, "variant": variant, "library": library, "seed": seed}
    return {**where, "points": points}


def test_a_gain_that_its_error_could_explain_is_no_gain():
    """PPO gains 0.3 with seed after seed. GRPO gains 0.6 once and nothing twice: 0.2 +- 0.2. A random reward must not gain."""
    found = [run("ppo", seed, 0.3, 0.6 + 0.01 * seed) for seed in range(3)]
    found += [run("grpo", seed, 0.3, last) for seed, last in enumerate((0.9, 0.3, 0.3))]
    found += [run("ppo", seed, 0.3, 0.5, "random reward") for seed in range(3)]
    verdicts = {claim.what: (claim.figure, claim.holds) for claim in claims(found)}
    assert verdicts["addition: PPO raises reward by 0.10 and 2 standard errors"] == ("+0.310 ± 0.006", True)
    assert verdicts["addition: GRPO raises reward by 0.10 and 2 standard errors"] == ("+0.200 ± 0.200", False)
    assert verdicts["addition: PPO's reward less GRPO's at equal samples is not below 0"][1]
    assert not verdicts["addition: a random reward does not raise reward (PPO, rlhf_fast)"][1]


def test_ppo_and_grpo_sample_as_much():
    for task in TASKS:
        ppo, grpo = (Cell(task, trainer) for trainer in ("ppo", "grpo"))
        assert ppo.rows_per_step * ppo.settings["max_steps"] == grpo.rows_per_step * grpo.settings["max_steps"]


def check_quick(tmp_path, monkeypatch, *options: str) -> set[tuple[str, str]]:
    """Run all cells of the preference task for two steps each; again, and nothing is trained. Gives trainers, libraries."""
    command = ["--quick", "--tasks", "preference", "--seeds", str(SEED), "-o", str(tmp_path), *options]
    bench.main(command)
    folder = tmp_path / "quick"
    with open(folder / "learning.csv") as file:
        rows = list(csv.DictReader(file))
    first = (folder / "learning.md").read_text()

    def refuse(*_):
        raise AssertionError("a cell that is done was trained again")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "train", refuse)
        bench.main(command)
        assert (folder / "learning.md").read_text() == first
        file = bench.cell_file(Cell("preference", "ppo", seed=SEED, quick=True), folder)
        file.write_text(file.read_text().replace('"kl_coef": 0.02', '"kl_coef": 0.03'))  # other settings than now
        with pytest.raises(AssertionError, match="trained again"):
            bench.main(command)
    assert (folder / "learning-preference-dark.png").stat().st_size > 10_000
    judged = {"reward", "quality", "greedy quality", "greedy accuracy", "eos rate", "preferred to SFT"}
    for trainer in ("ppo", "grpo", "dpo"):
        assert judged <= {row["metric"] for row in rows if row["trainer"] == trainer}
    assert {row["samples"] for row in rows if row["metric"] == "quality" and row["trainer"] == "grpo"} == {
        "0",
        "8",
        "16",
    }
    return {(row["trainer"], row["library"]) for row in rows}


def test_a_run_of_ours_writes_every_cell_and_goes_on_where_it_was(tmp_path, monkeypatch):
    found = check_quick(tmp_path, monkeypatch, "--peers", "none")
    assert found == {(cell.trainer, cell.library) for cell in cells(["preference"], [SEED], False, True)}


@pytest.mark.slow
def test_a_run_beside_trl_writes_every_cell(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    found = check_quick(tmp_path, monkeypatch)
    assert {trainer for trainer, library in found if library == "trl"} == {"reward", "dpo", "grpo"}
