"""Callbacks: what is called when, what may stop a run, and what a checkpoint remembers of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_fast import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import list_checkpoints
from rlhf_fast.run.config import parse_config
from rlhf_fast.run.metrics import read_metrics
from rlhf_fast.trainers.callbacks import Callback, EarlyStopping

ROWS = [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(["a", "hello", "to be", "x+y=z"])]


@pytest.fixture
def sft(make_model, tokenizer, settings):
    """sft(scores, **settings): a trainer whose evaluations give ``scores``, one after another, as eval_loss."""

    def make(scores=(), callbacks=(), **more):
        args = SFTConfig(**settings(**{"packing": False, "learning_rate": 1e-2, "max_steps": 8, **more}))
        data = {"train_dataset": ROWS, "eval_dataset": ROWS[:1]}
        made = SFTTrainer(make_model(), args, **data, processing_class=tokenizer, callbacks=callbacks)
        if scores:
            coming = iter(scores)
            made.evaluate = lambda: {"eval_loss": next(coming)}
        return made

    return make


class Recorder:
    """Notes what it is told: the events, with the step, and something of what comes with them."""

    def __init__(self):
        self.events = []

    def on_step(self, trainer, figures):
        self.events.append(("step", trainer.step, "loss" in figures))

    def on_rollout(self, trainer, experiences):
        self.events.append(("rollout", trainer.step, [e.reward for e in experiences]))

    def on_evaluate(self, trainer, figures):
        self.events.append(("evaluate", trainer.step, figures["eval_reward"]))

    def on_save(self, trainer, folder):
        self.events.append(("save", trainer.step, (folder / "manifest.json").is_file()))


def test_every_event_is_told_in_its_order(make_model, tokenizer, settings, scripted):
    """Two steps on each rollout, a log line every second step; an evaluation comes before the checkpoint of its step."""
    script = {"ab": ["a", "bb", "ccc!", "dd"]}
    options = {"num_generations": 4, "num_iterations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4}
    often = {"max_steps": 4, "logging_steps": 2, "eval_steps": 2, "save_steps": 3}
    recorder = Recorder()
    GRPOTrainer(
        make_model(),
        lambda completions, **_: [float(len(c)) for c in completions],
        GRPOConfig(**settings(**options, **often, learning_rate=0.0)),
        train_dataset=[{"prompt": "ab"}],
        eval_dataset=[{"prompt": "b"}],
        processing_class=tokenizer,
        engine=scripted(script),
        callbacks=[recorder],
    ).train()
    rewards = [1.0, 2.0, 3.0, 2.0]
    held_out = recorder.events[3][2]
    assert recorder.events == [
        ("rollout", 0, rewards),
        ("step", 1, False),
        ("step", 2, True),
        ("evaluate", 2, held_out),
        ("rollout", 2, rewards),
        ("step", 3, False),
        ("save", 3, True),
        ("step", 4, True),
        ("evaluate", 4, held_out),
        ("save", 4, True),
    ]


@pytest.mark.parametrize(
    ("scores", "more", "last"),
    [
        ([3.0, 2.0, 2.5, 2.0, 1.0], {}, 4),  # equal is not better
        ([3.0, 2.0, 2.5, 1.9, 2.5, 2.5, 1.0], {}, 6),  # one that is begins the count anew
        ([3.0, 2.9, 2.8, 1.0], {"early_stopping_threshold": 0.5}, 3),
        ([3.0, 2.7, 2.4, 2.1, 1.8, 1.8, 1.8, 1.0], {"early_stopping_threshold": 0.5}, 7),  # two small steps are one
        ([3.0, 4.0, 5.0, 4.0, 4.0, 9.0], {"greater_is_better": True}, 5),
        ([float("nan"), 3.0, float("nan"), 3.5, 1.0], {}, 4),  # what cannot be compared is not better
    ],
)
def test_early_stopping_counts_evaluations_that_are_not_better(scores, more, last, sft, capsys):
    made = sft(scores, eval_steps=1, early_stopping_patience=2, quiet=False, **more)
    made.train()
    assert made.step == last
    assert made.finished
    assert f"stopped at step {last}: no better loss than" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(Path(made.args.output_dir) / "checkpoints")][-1] == f"step-{last:08d}"
    assert (Path(made.args.output_dir) / "model.safetensors").is_file()


def test_a_run_that_stopped_early_stays_so_and_one_that_had_not_yet_counts_on(sft):
    scores = [3.0, 2.0, 2.5, 2.5, 2.5, 1.0]
    whole = sft(scores, eval_steps=1, early_stopping_patience=3, save_steps=1, save_total_limit=9)
    whole.train()
    assert whole.step == 5
    folder = Path(whole.args.output_dir) / "checkpoints"
    again = sft(scores[3:], eval_steps=1, early_stopping_patience=3)
    again.train(resume_from_checkpoint=str(folder / "step-00000003"))
    assert again.step == 5
    over = sft(["never asked"], eval_steps=1, early_stopping_patience=3)
    over.train(resume_from_checkpoint=str(folder / "step-00000005"))
    assert over.step == 5
    assert over.finished


def test_a_callback_may_stop_the_run_between_log_lines(sft):
    """The step is then evaluated, saved and logged as the last one of a run."""

    class Third(Callback):
        def on_step(self, trainer, figures):
            if trainer.step == 3:
                trainer.stop("enough")

    made = sft([2.0], callbacks=[Third()], logging_steps=10)
    final = made.train()
    assert made.step == 3
    assert final["eval_loss"] == 2.0
    assert {3} == {line["step"] for line in read_metrics(made.args.output_dir)}
    assert any("grad_norm" in line for line in read_metrics(made.args.output_dir))
    assert len(list_checkpoints(Path(made.args.output_dir) / "checkpoints")) == 1


class Counter(Callback):
    def __init__(self):
        self.steps = 0

    def on_step(self, trainer, figures):
        self.steps += 1
        trainer.metrics.add({"steps_seen": float(self.steps)}, 1.0)

    def state(self):
        return {"steps": self.steps}

    def load_state(self, state):
        self.steps = state["steps"]


def test_what_callbacks_remember_comes_back_to_each(sft):
    """Two of one class and a function; the resumed run has one more, which begins afresh."""
    first, second, new = Counter(), Counter(), Counter()
    second.steps = 100
    whole = sft(callbacks=[first, lambda event, trainer, what: None, second], max_steps=4, save_steps=4)
    whole.train()
    folder = Path(whole.args.output_dir) / "checkpoints/step-00000004"
    ones, hundreds = Counter(), Counter()
    again = sft(callbacks=[ones, hundreds, new], max_steps=6)
    again.train(resume_from_checkpoint=str(folder))
    assert (ones.steps, hundreds.steps, new.steps) == (6, 106, 2)


def test_figures_that_a_callback_adds_are_in_the_next_log_line(sft):
    made = sft(callbacks=[Counter()], max_steps=3)
    made.train()
    assert [line.get("steps_seen") for line in read_metrics(made.args.output_dir)] == [None, 1.0, 2.0, None]


def test_callbacks_are_found_by_their_dotted_path(make_model, tokenizer, settings, tmp_path, monkeypatch):
    (tmp_path / "my_callbacks.py").write_text(
        "class Stop:\n"
        "    def __init__(self, at=1):\n"
        "        self.at = at\n"
        "    def on_step(self, trainer, figures):\n"
        "        if trainer.step == self.at:\n"
        "            trainer.stop('there')\n"
        "seen = []\n"
        "def note(event, trainer, what):\n"
        "    seen.append((event, trainer.step))\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--callbacks", "my_callbacks:note", '{"name": "my_callbacks:Stop", "at": 2}', "--max_steps", "5"]
    config = parse_config(SFTConfig, [*flags, "--packing", "false", "--output_dir", "run", "--quiet"])
    made = SFTTrainer(make_model(), config, train_dataset=ROWS, processing_class=tokenizer)
    made.train()
    assert made.step == 2
    assert sys.modules["my_callbacks"].seen == [("on_step", 1), ("on_step", 2), ("on_save", 2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "callback: cannot import 'no_such_module'"),
        ("json:dumpz", "callback: module 'json' has no function 'dumpz'. Did you mean 'dump"),
        ("plain", "callbacks: 'plain' is none; give module:name"),
        (1.5, "is none; .* with any of on_step, on_rollout, on_evaluate, on_save"),
        (EarlyStopping, "callbacks: cannot make a EarlyStopping: .* missing 2 required"),
        ({"name": "json:dumps", "at": 2}, "takes no arguments, got at"),
    ],
    ids=str,
)
def test_what_is_no_callback_is_refused_at_the_start(spec, message, sft):
    with pytest.raises(UserError, match=message):
        sft(callbacks=[spec])


def test_what_a_callback_raises_ends_the_run(sft):
    def broken(event, trainer, what):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sft(callbacks=[broken]).train()
