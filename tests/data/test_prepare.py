"""What trainers receive, and whether the report tells the truth about the rest."""

import pytest

from rlhf_fast.data import TokenBatch
from rlhf_fast.data.prepare import (
    LONG_PROMPT,
    SAME_WHEN_CUT,
    TOO_LONG,
    prepare_preferences,
    prepare_prompts,
    prepare_sft,
)
from rlhf_fast.data.templates import MOVED_BOUNDARY, NO_TEMPLATE
from rlhf_fast.errors import UserError

# 5 tokens of prompt, 2 of completion, the stop token
SUMS = [{"prompt": f"{a}+1=", "completion": str(a + 1), "answer": str(a + 1)} for a in range(10, 40)]


def trained(example, tokenizer):
    return tokenizer.decode([i for i, m in zip(example.input_ids, example.response_mask) if m])


def test_every_kind_of_sft_row(tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    hh = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    for row, expected in [
        ({"prompt": "1+2=", "completion": "3"}, "3<|im_end|>"),
        ({"messages": chat}, "yes<|im_end|>"),
        ({"prompt": chat[:1], "completion": chat[1:]}, "yes<|im_end|>"),
        ({"text": "1+2=3"}, "+2=3<|im_end|>"),
        ({"question": "hi", "answer": "#### 3"}, "#### 3<|im_end|>"),
        ({"instruction": "hi", "output": "yes"}, "yes<|im_end|>"),
        (hh, "yes<|im_end|>"),
    ]:
        examples, report = prepare_sft([row], tokenizer)
        assert trained(examples[0], tokenizer) == expected
        assert report.trained_tokens == sum(examples[0].response_mask)


def test_switches_of_what_is_trained(tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert "hi" in trained(prepare_sft([{"messages": chat}], tokenizer, assistant_only=False)[0][0], tokenizer)
    whole = prepare_sft(SUMS[:1], tokenizer, completion_only=False)[0][0]
    assert trained(whole, tokenizer) == "0+1=11<|im_end|>"


def test_rows_packed_together_train_no_first_token_and_restart_positions(tokenizer):
    examples, _ = prepare_sft([{"text": "1+2=3"}, {"text": "46"}], tokenizer)
    batch = TokenBatch.pack(examples)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert batch.response_mask.tolist() == [False, True, True, True, True, True, False, True, True]
    examples[1].response_mask[0] = True  # whoever claims that it is trained
    assert TokenBatch.pack(examples).response_mask.tolist() == batch.response_mask.tolist()


def test_weights_reach_the_examples(tokenizer):
    rows = [{**SUMS[0], "weight": 0.25}, SUMS[1]]
    assert [e.weight for e in prepare_sft(rows, tokenizer)[0]] == [0.25, 1.0]


def test_the_report_counts_rows_and_tokens(tokenizer):
    _, report = prepare_sft(SUMS, tokenizer, name="eval")
    assert (report.rows, report.kept, report.tokens, report.trained_tokens, report.longest) == (30, 30, 240, 90, 8)
    assert str(report).splitlines()[0] == (
        "eval: 30 of 30 rows of the data (prompt and completion), 240 tokens, 90 trained, longest 8"
    )
    assert len(str(report).splitlines()) == 2 and report.lines()[1].startswith("tokens: vocabulary")


# ------------------------------------------------------------------------------------------------------ truncation


def test_truncation_is_reported_and_rows_without_label_are_dropped(tokenizer):
    """Of 8 tokens 7 fit: every row loses its stop token. The long row's prompt alone has 9: nothing left to train."""
    rows = [*SUMS[:3], {"prompt": "1+2+3+4+5=", "completion": "15"}]
    examples, report = prepare_sft(rows, tokenizer, max_length=7, allow_truncation=True)
    assert [trained(e, tokenizer) for e in examples] == ["11", "12", "13"]
    assert (report.truncated, report.tokens_cut, report.dropped) == (3, 3 + (13 - 7), {TOO_LONG: 1})
    text = str(report)
    assert "3 rows truncated to 7, 9 tokens cut" in text and f"1 rows dropped: {TOO_LONG}" in text


def test_more_than_one_percent_shortened_rows_are_refused(tokenizer):
    long = {"prompt": "1+2=", "completion": "3 " * 20}
    rows = SUMS[:10] * 20
    with pytest.raises(UserError, match=r"3 of 203 rows \(1.5%\) are longer than max_length 20 .*allow_truncation"):
        prepare_sft([*rows, *[long] * 3], tokenizer, max_length=20)
    assert prepare_sft([*rows, long], tokenizer, max_length=20)[1].truncated == 1
    assert prepare_sft([*rows, *[long] * 3], tokenizer, max_length=20, max_truncated_share=0.02)[1].truncated == 3
    assert prepare_sft([long], tokenizer, max_length=None)[1].truncated == 0


def test_when_no_row_is_left_it_is_an_error(tokenizer):
    with pytest.raises(UserError, match="no row is left"):
        prepare_sft(SUMS, tokenizer, max_length=3, allow_truncation=True)
    with pytest.raises(UserError, match="max_length must be at least 2"):
        prepare_sft(SUMS, tokenizer, max_length=1)


# ------------------------------------------------------------------------------------------------------ preferences


def test_pairs_and_rankings(tokenizer):
    pairs, report = prepare_preferences([{"prompt": "1+2=", "chosen": "3", "rejected": "4", "margin": 1}], tokenizer)
    assert [trained(e, tokenizer) for e in pairs[0].responses] == ["3<|im_end|>", "4<|im_end|>"]
    assert pairs[0].margin == 1.0 and report.tokens == 12
    row = {"prompt": "1+2=", "responses": ["5", "3", "4"], "ranking": [3, 1, 2]}
    ranked, _ = prepare_preferences([row], tokenizer)
    assert [trained(e, tokenizer)[0] for e in ranked[0].responses] == ["3", "4", "5"]
    assert ranked[0].margin is None


def test_responses_that_no_longer_differ_are_dropped(tokenizer):
    rows = [{"prompt": "1+2=", "chosen": "345", "rejected": "346"}, {"prompt": "1+2=", "chosen": "3", "rejected": "4"}]
    pairs, report = prepare_preferences(rows, tokenizer, max_length=6, allow_truncation=True)
    assert len(pairs) == 1 and report.dropped == {SAME_WHEN_CUT: 1}


# ---------------------------------------------------------------------------------------------------------- prompts


def test_prompts_carry_every_other_column_but_not_the_completion(tokenizer):
    prompts, _ = prepare_prompts([SUMS[0], {**SUMS[1], "level": 2}], tokenizer)
    assert tokenizer.decode(prompts[0].input_ids) == prompts[0].prompt == "10+1="
    assert [p.columns for p in prompts] == [{"answer": "11", "level": None}, {"answer": "12", "level": 2}]


def test_conversational_prompts_stay_messages(tokenizer):
    row = {"question": "hi", "answer": "so #### 3"}
    prompts, _ = prepare_prompts([row], tokenizer)
    assert prompts[0].prompt == [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(prompts[0].input_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[0].columns == {"answer": "3", "solution": "so #### 3"}


def test_long_prompts_are_dropped_never_cut(tokenizer):
    rows = [*SUMS, {"prompt": "1+2+3+4=", "answer": "10"}]
    prompts, report = prepare_prompts(rows, tokenizer, max_prompt_length=7, allow_truncation=True)
    assert len(prompts) == 30 and report.dropped == {LONG_PROMPT: 1} and report.longest == 8
    with pytest.raises(UserError, match="longer than max_prompt_length 7 .* Raise max_prompt_length"):
        prepare_prompts(rows, tokenizer, max_prompt_length=7)


# -------------------------------------------------------------------------------------------------- faults, by name


def test_a_row_that_the_template_refuses_is_named_or_dropped(tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "good", "answer": "1"}\n{"question": "bad", "answer": "1"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="d.jsonl, line 2: the chat template refuses these messages: no"):
        prepare_sft(path, tokenizer)
    examples, report = prepare_sft(path, tokenizer, bad_rows="drop")
    assert len(examples) == 1 and report.dropped == {"refused by template": 1}


def test_a_token_beyond_the_embedding_names_its_row(tokenizer):
    with pytest.raises(UserError, match="row 2: The token .* embeds only 260 ids"):
        prepare_sft([{"text": "1"}, {"text": "apples"}], tokenizer, vocab_size=260)


def test_what_was_put_right_is_counted_by_row(tokenizer):
    rows = [{"prompt": "the apple", "completion": "s"}, {"prompt": "the", "completion": " sum"}]
    _, report = prepare_sft(rows, tokenizer)
    assert report.notes == {MOVED_BOUNDARY: 1} and f"in 1 rows {MOVED_BOUNDARY}" in str(report)
    tokenizer.chat_template = None
    _, report = prepare_sft([{"question": "hi", "answer": "1"}] * 2, tokenizer)
    assert report.notes == {NO_TEMPLATE: 1} and "chat template with assistant markers" in report.audit[0]


def test_dropped_rows_count_as_rows(tokenizer):
    _, report = prepare_sft([SUMS[0], {**SUMS[0], "completion": ""}], tokenizer, bad_rows="drop")
    assert (report.rows, report.kept, report.dropped) == (2, 1, {"empty completion": 1})
