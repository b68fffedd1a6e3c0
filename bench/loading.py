"""Host memory and time of loading a sharded checkpoint: bf16, NF4, and a change of dtype.

    python -m bench.loading --gb 2 --shard_mb 200
    python -m bench.loading --model qwen2.5-7b --shard_mb 3900 --ways bf16 nf4

A random checkpoint, of a Qwen2 that is as large as is asked for or of a real shape of bench/train.py, is written shard by shard into a temporary folder, then each way of loading runs
in a process of its own. What counts is memory that the process allocates (RssAnon in /proc): it cannot be taken back
without swapping. Pages of the files themselves, which are mapped, show up in RSS and in VmHWM too, but are the
kernel's cache of the disk: they go as soon as somebody needs the memory. On a CPU the model itself counts as
allocated, except bf16 weights loaded as bf16, which stay mapped from the files. *extra* is the peak above what the
loaded model holds; it must stay below one shard, whatever the checkpoint's size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import host
from bench.shards import write_shards
from bench.train import MODELS, QWEN2

WAYS = {  # name -> dtype, 4 bit
    "bf16": ("bfloat16", False),
    "nf4": ("bfloat16", True),
    "fp32": ("float32", False),
}
VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--model", choices=sorted(MODELS), help="a real shape instead of a size")
    parser.add_argument("--shard_mb", type=float, default=200.0, help="size of each file of it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", help="where to write the checkpoint; a temporary folder when not given")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.device)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        shape = MODELS[args.model] if args.model else shape_of(args.gb * 1e9)
        size, shards = write_checkpoint(Path(temporary), shape, args.shard_mb * 1e6)
        print(f"checkpoint: {size / 1e9:.2f} GB of bf16 in {shards} files\n")
        print("| loaded as | seconds | weights | allocated by loading | of that extra | mapped | VmHWM |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for way in args.ways:
            command = [sys.executable, "-m", "bench.loading", "--measure", way, temporary, "--device", args.device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            mb = [f"{row[k]:,.0f} MB" for k in ("weights", "allocated", "extra", "mapped", "high_water")]
            print(f"| {way} | {row['seconds']:.1f} | {' | '.join(mb)} |", flush=True)


def shape_of(size: float, hidden: int = 2048) -> dict[str, Any]:
    """The config of a Qwen2 of about ``size`` bytes in bf16."""
    wide = hidden * 11 // 4
    per_layer = 2 * (2 * hidden * hidden + 2 * hidden * (hidden // 4) + 3 * hidden * wide)
    return {
        **QWEN2,
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": max(1, round((size - 4 * VOCABULARY * hidden) / per_layer)),
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }


def write_checkpoint(folder: Path, shape: dict[str, Any], shard_size: float) -> tuple[int, int]:
    """A model of ``shape`` with random bf16 weights, and a tokenizer. Returns its bytes and number of files."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(**shape, tie_word_embeddings=False, dtype="bfloat16")
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        shard: dict[str, torch.Tensor] = {}
        for i, (name, size) in enumerate(shapes.items(), start=1):
            shard[name] = torch.randn(size, dtype=torch.bfloat16) * 0.02
            if sum(t.nbytes for t in shard.values()) >= shard_size or i == len(shapes):
                yield shard
                shard = {}

    return write_shards(shards(), folder)


def measure(way: str, folder: str, device: str) -> dict[str, float]:
    """Load once in this process; megabytes and seconds."""
    import torch

    from rlhf_fast.models import load
    from rlhf_fast.models.load import weight_bytes

    dtype, in_4bit = WAYS[way]
    if in_4bit:
        import bitsandbytes  # noqa: F401  (a library's own memory is not loading's)
    if device != "cpu":
        torch.zeros(1, device=device)
    before = host.memory()["RssAnon"]
    peaks = {"RssAnon": 0.0, "RssFile": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            now = host.memory()
            peaks.update({name: max(peak, now[name]) for name, peak in peaks.items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    policy = load(folder, dtype=getattr(torch, dtype), device=device, load_in_4bit=in_4bit)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    after = host.memory()
    return {
        "seconds": seconds,
        "weights": weight_bytes(policy.model) / 1e6,
        "allocated": (max(peaks["RssAnon"], after["RssAnon"]) - before) / 1e6,
        "extra": max(0.0, peaks["RssAnon"] - after["RssAnon"]) / 1e6,
        "mapped": peaks["RssFile"] / 1e6,
        "high_water": after["VmHWM"] / 1e6,
    }


if __name__ == "__main__":
    main()
