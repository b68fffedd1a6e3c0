"""The command line: quick to answer, clear about mistakes, and a whole small run through it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_fast import cli
from rlhf_fast.cli import COMMANDS, main
from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import list_checkpoints
from rlhf_fast.run.metrics import MetricsLog, read_metrics

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_answers_within_half_a_second_and_without_torch():
    """The whole process, the best of three: other work on the machine is not our doing."""
    code = (
        "import sys; from rlhf_fast.cli import main; main(['--help']); "
        "bad = {'torch', 'transformers', 'rich', 'yaml', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.5
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.description in done.stdout


def test_every_command_exists():
    """Each target imports: a module with ``main``, or with the trainer's config and class."""
    for name, command in COMMANDS.items():
        module, function = command.target.split(":")
        names = [f"{function}Config", f"{function}Trainer"] if command.group == "train" else [function]
        for attribute in names:
            assert callable(getattr(cli._load(module), attribute)), name


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "quickstart"])
def test_every_command_has_help(name, capsys):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"usage: rlhf-fast {name}")
    assert all(not line.rstrip().endswith("()") for line in out.splitlines())


def test_every_setting_of_every_trainer_says_what_it_means():
    from rlhf_fast.run.config import _owners, field_comments

    for name in ("sft", "reward", "dpo", "kto", "ppo", "safe-ppo", "grpo"):
        module, prefix = COMMANDS[name].target.split(":")
        config_class = getattr(cli._load(module), f"{prefix}Config")
        for setting, owner in _owners(config_class).items():
            assert field_comments(owner).get(setting), f"{owner.__name__}.{setting} has no comment on its line"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["gropo"], "unknown command 'gropo'; did you mean grpo?"),
        (["xyzzy"], "unknown command 'xyzzy'; rlhf-fast --help lists them"),
        (["grpo", "--learning_rat", "1"], "--learning_rat: unknown setting; did you mean --learning_rate?"),
        (["sft", "--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["sft"], "model_name_or_path is missing"),
        (["export", "nowhere", "-o", "x"], "nowhere is not a folder"),
        (["export"], "the following arguments are required: RUN"),
        (["export", "nowhere", "-o", "x", "--merg"], "did you mean --merge?"),
        (["env", "runs/x", "stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(argv, said, capsys):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_interrupts_and_files_in_the_way_leave_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(argv):
        raise KeyboardInterrupt

    (tmp_path / "file").touch()
    monkeypatch.setattr("rlhf_fast.commands.env.main", interrupted)
    assert run(capsys, "env") == (130, "", "error: interrupted\n")
    monkeypatch.setattr("rlhf_fast.commands.env.main", lambda argv: (tmp_path / "file" / "x").mkdir())
    code, _, err = run(capsys, "env")
    assert code == 2
    assert "file/x: Not a directory" in err
    monkeypatch.setenv("RLHF_FAST_TRACEBACK", "1")
    with pytest.raises(NotADirectoryError):
        main(["env"])


def test_a_reader_that_leaves_is_no_error():
    """``rlhf-fast --help | head -1``."""
    command = f"{sys.executable} -m rlhf_fast --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rlhf-fast")
    assert done.stderr == ""


def test_the_parser_of_commands_refuses_abbreviations():
    parser = Parser("export", "x")
    parser.add_argument("--merge", action="store_true")
    with pytest.raises(UserError, match="rlhf-fast export: unrecognized arguments: --mer; did you mean --merge?"):
        parser.parse_args(["--mer"])


def test_env_reports_versions_and_the_backend_of_every_kernel(capsys):
    from rlhf_fast.kernels import backend_report

    code, out, _ = run(capsys, "env")
    assert code == 0
    assert torch.__version__ in out
    for row in backend_report():
        assert row.op in out
    assert "compiled extension" in out


def test_an_unknown_backend_in_the_environment_is_named(capsys, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cuda,tritn")
    for argv in (["env"], ["sft"]):
        code, _, err = run(capsys, *argv)
        assert code == 2
        assert "unknown backend 'tritn'" in err


# ---- a run, from nothing to an exported model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Sums, and a model of two layers made by ``new-model``."""
    folder = tmp_path_factory.mktemp("cli")
    draw = random.Random(0)
    with (folder / "sums.jsonl").open("w") as file:
        for _ in range(64):
            a, b = draw.randrange(100), draw.randrange(100)
            file.write(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)}) + "\n")
    argv = ["new-model", "--preset", "nano", "--corpus", folder / "sums.jsonl", "-o", folder / "model"]
    assert main([str(a) for a in argv]) == 0
    (folder / "sft.yaml").write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset_name: {folder / 'sums.jsonl'}\n"
        "use_peft: true\nlearning_rate: 1e-2\nlogging_steps: 1\nsave_steps: 2\nmax_steps: 4\nmax_length: 64\n"
    )
    return folder


@pytest.fixture(scope="module")
def sft_run(workplace):
    folder = workplace / "run"
    assert main(["sft", "--config", str(workplace / "sft.yaml"), "--output_dir", str(folder)]) == 0
    return folder


def test_a_run_leaves_model_metrics_plots_and_checkpoints(sft_run):
    assert [row["step"] for row in read_metrics(sft_run)] == [1, 2, 3, 4]
    assert [p.name for p in list_checkpoints(sft_run / "checkpoints")] == ["step-00000002", "step-00000004"]
    for name in ("config.yaml", "adapter_model.safetensors", "tokenizer.json", "plots/curves.png", "plots/loss.png"):
        assert (sft_run / name).is_file(), name
    assert "resume_from_checkpoint: null" in (sft_run / "config.yaml").read_text()


def test_a_run_prints_a_table_and_what_to_try_next(workplace, capsys):
    code, out, _ = run(capsys, "sft", "--config", workplace / "sft.yaml", "--output_dir", workplace / "again")
    assert code == 0
    for part in (
        "step 1/4  loss",
        "sft: step 4 of 4",
        "grad_norm",
        f"model: {workplace / 'again'}",
        "next:  rlhf-fast",
    ):
        assert part in out


def test_a_second_run_does_not_overwrite_the_first(workplace, sft_run, capsys):
    before = (sft_run / "metrics.jsonl").read_bytes()
    code, _, err = run(capsys, "sft", "--config", workplace / "sft.yaml", "--output_dir", sft_run)
    assert code == 2
    assert "already holds a run, saved at step-00000004; go on with it by --resume" in err
    assert (sft_run / "metrics.jsonl").read_bytes() == before


def test_a_stopped_run_resumes_to_the_same_weights(workplace, sft_run, capsys, monkeypatch):
    """SIGTERM as the first line is logged: exit code 130; ``--resume`` from the saved config ends bit for bit alike."""
    folder = workplace / "stopped"
    log = MetricsLog.log

    def log_and_stop(self, step, metrics):
        log(self, step, metrics)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", log_and_stop)
        code, out, _ = run(capsys, "sft", "--config", workplace / "sft.yaml", "--output_dir", folder)
    assert code == 130
    assert f"next:  rlhf-fast sft --config {folder / 'config.yaml'} --resume" in out
    assert len(read_metrics(folder)) < 4
    code, _, _ = run(capsys, "sft", "--config", folder / "config.yaml", "--resume")
    assert code == 0
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
    weights = [(f / "adapter_model.safetensors").read_bytes() for f in (folder, sft_run)]
    assert weights[0] == weights[1]


def test_resuming_without_a_checkpoint_says_so(workplace, capsys):
    argv = ["sft", "--config", workplace / "sft.yaml", "--output_dir", workplace / "nothing", "--resume"]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert "cannot resume: there is no checkpoint in" in err


def test_the_exported_model_gives_the_logits_of_the_run(workplace, sft_run, capsys):
    """Plain transformers on the exported folder against PEFT on the run, fp32; the adapter moves them by far more."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    exported = sft_run.with_name(f"{sft_run.name}-merged")  # where it goes when nobody says
    code, out, _ = run(capsys, "export", sft_run, "--merge")
    assert code == 0
    assert "adapter merged, float32" in out
    assert not list(exported.glob("adapter*"))
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(workplace / "model")(ids).logits
        trained = AutoPeftModelForCausalLM.from_pretrained(sft_run)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(exported)(ids).logits
    assert (trained - base).abs().max() > 1e-2
    torch.testing.assert_close(plain, trained, atol=1e-5, rtol=0)

    code, _, err = run(capsys, "export", sft_run, "--merge", "-o", exported)
    assert code == 2
    assert "not an empty folder" in err


def test_an_export_without_merge_is_the_adapter_alone(workplace, sft_run, capsys):
    code, out, _ = run(capsys, "export", sft_run, "-o", workplace / "adapter")
    assert code == 0
    assert "with --merge" in out
    weights = [(f / "adapter_model.safetensors").read_bytes() for f in (workplace / "adapter", sft_run)]
    assert weights[0] == weights[1]
    assert not (workplace / "adapter" / "checkpoints").exists()


def test_a_run_on_a_4bit_base_generates_in_4_bit_and_exports_without(workplace, capsys):
    """The flag trains, the run folder remembers it, and the merged model is the running one to fp32's precision."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    folder = workplace / "nf4"
    argv = (
        "sft",
        "--config",
        workplace / "sft.yaml",
        "--output_dir",
        folder,
        "--load_in_4bit",
        "--optim",
        "adamw_8bit",
    )
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "NF4, computing in float32" in out
    code, greedy, _ = run(capsys, "generate", folder, "--prompt", "1+2=", "--temperature", 0, "--max_new_tokens", 4)
    assert code == 0
    code, out, _ = run(capsys, "export", folder, "--merge")
    assert code == 0
    assert "the base is in 4 bit: dequantized to float32 and merged there, never quantized again" in out
    merged = AutoModelForCausalLM.from_pretrained(workplace / "nf4-merged")
    assert not hasattr(merged.config, "quantization_config")
    prompt = ("--prompt", "1+2=", "--temperature", 0, "--max_new_tokens", 4)
    assert run(capsys, "generate", workplace / "nf4-merged", *prompt)[1] == greedy
    code, out, err = run(capsys, "generate", workplace / "model", "--load_in_4bit", *prompt)
    assert code == 0, err
    code, _, err = run(capsys, "sft", "--config", workplace / "sft.yaml", "--load_in_4bit", "--use_peft", "false")
    assert code == 2
    assert "a 4-bit base is frozen and takes an adapter: add use_peft" in err
