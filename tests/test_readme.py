"""What the README says about settings is what the trainers take."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import yaml

from rlhf_fast import GRPOConfig, PPOConfig, SafePPOConfig
from rlhf_fast.run.config import parse_config
from rlhf_fast.trainers.guard import LIMITS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_variant_of_grpo_in_the_table_is_a_config():
    """Written as YAML, every key and value is taken as it stands; no two rows are the same."""
    table = README[README.index("| variant | settings") :].split("\n\n")[0]
    rows = [line.split("|")[2] for line in table.splitlines()[2:]]
    configs = [yaml.safe_load("\n".join(re.findall(r"`([^`]+)`", row))) for row in rows]
    assert len(configs) == 12
    for values in configs:
        flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        config = parse_config(GRPOConfig, flags)
        assert {key: getattr(config, key) for key in values} == values
    assert len({str(sorted(values.items())) for values in configs}) == len(configs)


def test_the_settings_of_watching_a_run_are_real(tmp_path):
    text = README[README.index("### Watching a run") :]
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    path = tmp_path / "watch.yaml"
    path.write_text(block)
    config = parse_config(GRPOConfig, ["--config", str(path)])
    assert config.load_best_model_at_end
    assert config.callbacks == ["my_callbacks:Watch"]


def test_the_rewards_of_the_judge_section_are_real(tmp_path):
    """Every option is one that the reward has; nobody is asked."""
    from rlhf_fast.rewards.judge import Judge

    block = re.search(r"```yaml\n(reward_funcs:.*?)```", README[README.index("### Labels from an AI") :], re.DOTALL)[1]
    path = tmp_path / "judge.yaml"
    path.write_text(block)
    rewards = parse_config(GRPOConfig, ["--config", str(path)]).reward_funcs
    assert [reward.pop("name") for reward in rewards] == ["judge", "judge"]
    for reward in rewards:
        inspect.signature(Judge).bind(**reward)


def test_the_guards_table_and_settings_are_its_own(tmp_path):
    text = README[README.index("### When the policy cheats its reward") :]
    path = tmp_path / "guard.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    for config_class in (GRPOConfig, PPOConfig, SafePPOConfig):
        assert parse_config(config_class, ["--config", str(path)]).guard_limits == {"kl": 30.0}
    table = text[text.index("| sign |") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`[,|\s]", "".join(row.split("|")[1] for row in table.splitlines()[2:]))) == set(
        LIMITS
    )


def test_the_settings_of_safe_rlhf_are_real(tmp_path):
    block = re.search(r"```yaml\n(.*?)```", README[README.index("### Safe RLHF") :], re.DOTALL)[1]
    path = tmp_path / "safe.yaml"
    path.write_text(block)
    for config_class in (GRPOConfig, SafePPOConfig):
        config = parse_config(config_class, ["--config", str(path)])
        assert (config.cost_funcs, config.cost_limit) == (["my_rewards:harmful"], 0.1)
