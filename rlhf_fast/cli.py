"""The command line. A command's module is imported when the command runs, so ``rlhf-fast --help`` answers at once."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError


class Command(NamedTuple):
    group: str
    description: str
    target: str  # module:function called with the arguments, or module:Prefix of a trainer's config and trainer class
    next: tuple[str, ...] = ()  # what to try after a training, {run} being its folder


_TRY = ("rlhf-fast generate {run}", "rlhf-fast export {run} --merge -o {run}-merged")
COMMANDS = {
    "quickstart": Command(
        "start",
        "the whole road on a tiny model: SFT, reward model, PPO, GRPO; no downloads",
        "commands.quickstart:main",
    ),
    "new-model": Command("start", "make a small model and its tokenizer from scratch", "commands.new_model:main"),
    "plan": Command("start", "what a run needs in memory, and which settings make it fit", "commands.plan:main"),
    "check": Command("start", "what a training run would make of a data set, row by row", "commands.check:main"),
    "sft": Command(
        "train",
        "supervised fine-tuning on prompts with their responses",
        "trainers.sft:SFT",
        (
            "rlhf-fast generate {run}",
            "rlhf-fast grpo --model_name_or_path {run} --dataset_name PROMPTS --reward_funcs answer",
        ),
    ),
    "reward": Command(
        "train",
        "a reward model from comparisons: pairs, or rankings of several responses",
        "trainers.reward:Reward",
        ("rlhf-fast ppo --model_name_or_path SFT_RUN --reward_model_path {run} --dataset_name PROMPTS",),
    ),
    "dpo": Command("train", "preferences straight into the policy, without a reward model", "trainers.dpo:DPO", _TRY),
    "kto": Command("train", "responses labelled good or bad, no pairs, into the policy", "trainers.kto:KTO", _TRY),
    "ppo": Command("train", "reinforcement learning with a critic, against a reward model", "trainers.ppo:PPO", _TRY),
    "safe-ppo": Command(
        "train", "PPO within a limit of harm: a reward and a cost model (Safe RLHF)", "trainers.safe_ppo:SafePPO", _TRY
    ),
    "grpo": Command("train", "reinforcement learning with groups of responses, no critic", "trainers.grpo:GRPO", _TRY),
    "label": Command("label", "people's preferences over responses, on a page in the browser", "commands.label:main"),
    "judge": Command("label", "an AI judge's preferences over responses: pairs or rankings", "commands.judge:main"),
    "constitution": Command("label", "responses criticised and rewritten by principles", "commands.constitution:main"),
    "generate": Command("use", "responses of a model to prompts", "commands.generate:main"),
    "evaluate": Command("use", "rewards of a model on held-out prompts", "commands.evaluate:main"),
    "serve": Command("use", "a model and its adapters over HTTP, as OpenAI and vLLM have it", "commands.serve:main"),
    "code-runner": Command("use", "grade programs for training runs on other machines", "commands.code_runner:main"),
    "export": Command("use", "a run as a plain Hugging Face folder", "commands.export:main"),
    "env": Command("use", "versions, devices, and the backend of every kernel", "commands.env:main"),
}
GROUPS = {"start": "start here", "label": "make training data", "train": "train", "use": "use the result"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except UserError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:  # `rlhf-fast grpo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except OSError as error:
        known = isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
        if not (full or (known and error.filename)) or "RLHF_FAST_TRACEBACK" in os.environ:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror} (RLHF_FAST_TRACEBACK=1 shows where)")
        return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"rlhf-fast {_version()}")
        return 0
    name, rest = argv[0].replace("_", "-"), argv[1:]
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "rlhf-fast --help lists them"
        raise UserError(f"unknown command {name!r}; {hint}")
    if command.group == "train":
        return train(name, rest)
    module, function = command.target.split(":")
    main_function: Callable[[Sequence[str]], int | None] = getattr(_load(module), function)
    return main_function(rest) or 0


def train(name: str, argv: Sequence[str]) -> int:
    """Run the trainer ``name``: config from flags and YAML, training, then table, plots and what to try next."""
    from rlhf_fast.run.config import parse_config

    config_class, trainer_class = trainer_of(name)
    _check_backend()
    config = parse_config(
        config_class,
        ["--resume_from_checkpoint" + arg[8:] if arg.split("=")[0] == "--resume" else arg for arg in argv],
        prog=f"rlhf-fast {name}",
        description=f"{COMMANDS[name].description}.\n\n--resume goes on from the last good checkpoint.",
    )
    _quiet_libraries()
    resume = config.resume_from_checkpoint
    _refuse_to_overwrite(Path(config.output_dir), resume)
    # not part of what the run is: its saved config starts a fresh run
    trainer = trainer_class.from_config(dataclasses.replace(config, resume_from_checkpoint=None))
    figures = trainer.train(resume_from_checkpoint=resume)
    if int(os.environ.get("RANK", "0")) == 0:
        _report(name, trainer, figures or {}, config)
    # a stopped run must not let a `sft && ppo` go on with half a model
    return 0 if trainer.finished else 130


def trainer_of(name: str) -> tuple[Any, Any]:
    """The config class and the trainer class of a command that trains."""
    module, prefix = COMMANDS[name].target.split(":")
    return tuple(getattr(_load(module), prefix + what) for what in ("Config", "Trainer"))


def _check_backend() -> None:
    from rlhf_fast.kernels import use_backend

    try:
        with use_backend(os.environ.get("RLHF_FAST_BACKEND") or "auto"):
            pass
    except ValueError as error:
        raise UserError(f"RLHF_FAST_BACKEND: {error}") from error


def _quiet_libraries() -> None:
    """In a log file the progress bars of loading and saving are only noise."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _refuse_to_overwrite(run: Path, resume: Any) -> None:
    from rlhf_fast.run.checkpoint import list_checkpoints

    found = list_checkpoints(run / "checkpoints")
    if found and not resume:
        raise UserError(
            f"{run} already holds a run, saved at {found[-1].name}; "
            "go on with it by --resume, or give another --output_dir (or delete the folder)"
        )


def _report(name: str, trainer: Any, figures: dict[str, float], config: Any) -> None:
    from rlhf_fast.run.metrics import print_table
    from rlhf_fast.run.plots import plot_run

    run = Path(config.output_dir)
    first = [key for key in trainer.headline if key in figures]
    rest = [key for key in figures if key not in first and not key.startswith("time/")]
    if not config.quiet and figures:
        print_table(
            f"{name}: step {trainer.step} of {trainer.expected_steps}", {key: figures[key] for key in first + rest}
        )
    plots = plot_run(run, headline=first[0] if first else None)
    print(f"\nmodel: {run}")
    if plots:
        print(f"plots: {', '.join(map(str, plots))}")
    if not trainer.finished:
        print(f"next:  rlhf-fast {name} --config {run / 'config.yaml'} --resume")
        return
    for command in getattr(trainer, "next_commands", None) or COMMANDS[name].next:
        print(f"next:  {command.format(run=run)}")


def _load(module: str) -> Any:
    return importlib.import_module(f"rlhf_fast.{module}")


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rlhf_fast")
    except PackageNotFoundError:
        return "(uninstalled)"


def _help() -> str:
    lines = ["rlhf-fast: from preferences to policy on one GPU", "", "usage: rlhf-fast COMMAND [options]"]
    for group, title in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<14}{c.description}" for name, c in COMMANDS.items() if c.group == group]
    lines += ["", "`rlhf-fast COMMAND --help` explains a command's options; `rlhf-fast --version` prints the version."]
    return "\n".join(lines)
