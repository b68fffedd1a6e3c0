"""Every recipe in the package is one that its trainer takes as it stands."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast.models.adapters import is_4bit
from rlhf_fast.models.scratch import new_model
from rlhf_fast.run.config import parse_config, read_yaml
from rlhf_fast.trainers.config import RLConfig

RECIPES = sorted((Path(rlhf_fast.__file__).parent / "recipes").glob("*.yaml"))
TRAINERS = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "ppo": "PPO"}
TRAINERS |= {"safe-ppo": "SafePPO", "grpo": "GRPO"}
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def algorithm_of(recipe: Path) -> str:
    return next(name for name in TRAINERS if recipe.stem.startswith(f"{name}-"))


def classes(recipe: Path) -> tuple[type, type]:
    """Config and trainer of the algorithm whose name begins the file's."""
    algorithm = algorithm_of(recipe)
    module = importlib.import_module(f"rlhf_fast.trainers.{algorithm.replace('-', '_')}")
    return tuple(getattr(module, TRAINERS[algorithm] + kind) for kind in ("Config", "Trainer"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return new_model("nano", ["12+5=", "17", "a b c"], tmp_path_factory.mktemp("recipes") / "model", quiet=True)


def test_every_algorithm_has_one_for_a_7b_model_and_one_for_a_cpu():
    assert {path.stem for path in RECIPES} == {
        f"{a}-{size}" for a in TRAINERS for size in ("7b-lora", "7b-qlora", "tiny")
    }


@recipes
def test_its_bare_name_is_enough_from_any_folder(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config_class = classes(recipe)[0]
    assert parse_config(config_class, ["--config", recipe.stem]) == parse_config(
        config_class, ["--config", str(recipe)]
    )


@recipes
def test_its_settings_are_the_trainers_own(recipe):
    """An unknown key or a value of the wrong type is an error of the parser."""
    config = parse_config(classes(recipe)[0], ["--config", str(recipe)])
    for key, value in read_yaml(recipe).items():
        assert getattr(config, key) == value
    assert isinstance(config.learning_rate, float), "1e-5 without a point is a string to a YAML 1.1 parser"


@recipes
def test_its_command_line_names_it(recipe):
    algorithm = algorithm_of(recipe)
    comment = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"rlhf-fast {algorithm} --config {recipe.name} --dataset_name" in line for line in comment)


@recipes
def test_its_trainer_takes_it(recipe, model, tmp_path):
    """Batch sizes that fit together, roles, adapters: everything but the model's size, checked at construction."""
    if recipe.stem.endswith("qlora"):
        pytest.importorskip("bitsandbytes")
    config_class, trainer_class = classes(recipe)
    config = parse_config(config_class, ["--config", str(recipe)])
    rows = [{"prompt": f"{i}+5=", "answer": str(i + 5), "chosen": str(i + 5), "rejected": "a"} for i in range(4)]
    if recipe.stem.startswith("kto"):
        rows = [{"prompt": r["prompt"], "completion": r["answer"], "label": True} for r in rows]
    options = {}
    if isinstance(config, RLConfig) and not config.reward_funcs:  # the reward model comes by the command line
        options["reward_funcs"] = ["answer"]
    costs = {"cost_funcs": ["exact"]} if recipe.stem.startswith("safe") else {}  # as does the cost model
    config = dataclasses.replace(config, output_dir=str(tmp_path), quiet=True, **costs)
    trainer = trainer_class(str(model), args=config, train_dataset=rows, **options)
    assert trainer.total_steps >= 1
    assert bool(trainer.policy.adapters.names) == config.use_peft
    assert is_4bit(trainer.policy.model) == config.load_in_4bit == recipe.stem.endswith("qlora")
