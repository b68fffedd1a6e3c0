"""``rlhf-fast new-model``: a small model from scratch, its tokenizer trained on a text of yours. Needs no downloads."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.commands import Parser


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "new-model", "Make a model folder from scratch: config, tokenizer with a chat template, random weights."
    )
    parser.add_argument("--preset", default="tiny", help="size: nano, tiny, small or base")
    parser.add_argument(
        "--corpus", required=True, help="text, .jsonl, .json, .csv or .parquet to train the tokenizer on"
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--vocab_size", type=int, help="entries of the vocabulary; the preset's when not given")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args(argv)

    from rlhf_fast.models.scratch import new_model

    folder = new_model(args.preset, args.corpus, args.output, vocab_size=args.vocab_size, seed=args.seed)
    print(f"\nnext: rlhf-fast sft --model_name_or_path {folder} --dataset_name DATA.jsonl")
    return 0
