"""Records to packed batches: sources, formats, chat templates and masks, packing, and the project's own small tasks."""

from rlhf_fast.data.batch import Example, Experience, Labelled, Preference, Prompt, TokenBatch
from rlhf_fast.data.formats import final_answer, normalise, parse_transcript
from rlhf_fast.data.packing import IndexSampler, pack_bins
from rlhf_fast.data.prepare import Report, prepare_labelled, prepare_preferences, prepare_prompts, prepare_sft
from rlhf_fast.data.sources import BadRow, Records, load_records, train_test
from rlhf_fast.data.templates import (
    Encoder,
    encode_messages,
    encode_prompt,
    encode_prompt_completion,
    encode_text,
    set_chat_template,
    token_audit,
)

__all__ = [
    "BadRow",
    "Encoder",
    "Example",
    "Experience",
    "IndexSampler",
    "Labelled",
    "Preference",
    "Prompt",
    "Records",
    "Report",
    "TokenBatch",
    "encode_messages",
    "encode_prompt",
    "encode_prompt_completion",
    "encode_text",
    "final_answer",
    "load_records",
    "normalise",
    "pack_bins",
    "parse_transcript",
    "prepare_labelled",
    "prepare_preferences",
    "prepare_prompts",
    "prepare_sft",
    "set_chat_template",
    "token_audit",
    "train_test",
]
