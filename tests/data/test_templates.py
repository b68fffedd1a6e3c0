"""Token ids and masks, judged by the text that the trained tokens spell."""

import re

import pytest

from rlhf_fast.data.templates import (
    DOUBLE_BOS,
    MOVED_BOUNDARY,
    NO_STOP,
    NO_TEMPLATE,
    Encoder,
    common_prefix_length,
    encode_messages,
    encode_prompt,
    encode_prompt_completion,
    encode_text,
    set_chat_template,
    token_audit,
    truncate,
)
from rlhf_fast.errors import UserError

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Are the apples ready?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "And the sum?"},
    {"role": "assistant", "content": "It is 46."},
]


def trained(example, tokenizer):
    """The trained tokens as text."""
    return tokenizer.decode([i for i, m in zip(example.input_ids, example.response_mask) if m])


def without_markers(tokenizer):
    tokenizer.chat_template = re.sub(r"\{%-? (end)?generation %\}", "", tokenizer.chat_template)
    assert "generation %" not in tokenizer.chat_template
    return tokenizer


# --------------------------------------------------------------------------------------------------- plain strings


def test_a_plain_completion_is_trained_with_its_stop_token(tokenizer):
    example = encode_prompt_completion("12+34=", "46", tokenizer)
    assert example.input_ids == [*tokenizer("12+34=46").input_ids, tokenizer.eos_token_id]
    assert trained(example, tokenizer) == "46<|im_end|>"
    assert example.input_ids[: len(encode_prompt("12+34=", tokenizer))] == encode_prompt("12+34=", tokenizer)


def test_the_first_token_of_a_sequence_is_never_trained(tokenizer):
    example = encode_text("apples", tokenizer)
    assert example.response_mask[0] is False and all(example.response_mask[1:])
    assert encode_prompt_completion("p", "c", tokenizer, completion_only=False).response_mask[:2] == [False, True]


def test_a_stop_token_in_the_data_is_not_doubled(tokenizer):
    assert encode_prompt_completion("1+2=", "3<|im_end|>", tokenizer).input_ids.count(tokenizer.eos_token_id) == 1


def test_a_token_that_merges_across_the_boundary_is_trained_and_noted(tokenizer):
    """' apple' + 's' is one token ' apples', so the prompt's last token does not occur in the whole."""
    encoder = Encoder(tokenizer)
    prompt = encoder.prompt("the apple")
    example = encoder.prompt_completion("the apple", "s are ready")
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "Ġapple"
    assert trained(example, tokenizer) == " apples are ready<|im_end|>"
    assert encoder.notes == {MOVED_BOUNDARY: 1}


def test_a_clean_boundary_is_not_noted(tokenizer):
    encoder = Encoder(tokenizer)
    encoder.prompt_completion("the sum is", " 46")
    assert not encoder.notes


@pytest.mark.parametrize("fixture", ["bos_tokenizer", "bos_eos_tokenizer"])
def test_bos_and_eos_of_the_tokenizer_are_neither_lost_nor_doubled(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    assert tokenizer.convert_ids_to_tokens(encode_prompt("1+2=", tokenizer)) == ["<s>", "1", "+", "2", "="]
    ids = encode_prompt_completion("1+2=", "3", tokenizer).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "1", "+", "2", "=", "3", "<|im_end|>"]


def test_a_bos_written_in_the_text_too_is_removed_once(bos_tokenizer):
    encoder = Encoder(bos_tokenizer)
    assert bos_tokenizer.convert_ids_to_tokens(encoder.prompt("<s>1")) == ["<s>", "1"]
    assert encoder.notes == {DOUBLE_BOS: 1}


def test_pad_equal_to_eos_leaves_the_stop_token_trained(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    assert trained(encode_prompt_completion("1+2=", "3", tokenizer), tokenizer) == "3<|im_end|>"
    assert trained(encode_messages(CHAT, tokenizer), tokenizer) == "yes<|im_end|>It is 46.<|im_end|>"


# -------------------------------------------------------------------------------------------------------- messages


def test_markers_and_rendering_message_by_message_give_the_same_mask(tokenizer):
    marked = encode_messages(CHAT, tokenizer)
    rendered = encode_messages(CHAT, without_markers(tokenizer))
    assert marked == rendered
    assert trained(marked, tokenizer) == "yes<|im_end|>It is 46.<|im_end|>"


def test_a_conversation_ends_at_its_last_stop_token(tokenizer):
    """ChatML writes a newline after it, which no rollout would ever produce."""
    for assistant_only in (True, False):
        assert encode_messages(CHAT, tokenizer, assistant_only=assistant_only).input_ids[-1] == tokenizer.eos_token_id
    assert encode_prompt_completion(CHAT[:4], CHAT[4:], tokenizer).input_ids[-1] == tokenizer.eos_token_id


def test_all_messages_are_trained_when_asked(tokenizer):
    example = encode_messages(CHAT, tokenizer, assistant_only=False)
    assert all(example.response_mask[1:]) and "Are the apples ready?" in trained(example, tokenizer)


def test_a_conversational_prompt_is_what_generation_sees(tokenizer):
    prompt = encode_prompt(CHAT[:4], tokenizer)
    expected = tokenizer.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == expected
    example = encode_prompt_completion(CHAT[:4], CHAT[4:], tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    assert trained(example, tokenizer) == "It is 46.<|im_end|>"


def test_of_a_completion_with_several_turns_only_the_assistants_are_trained(tokenizer):
    example = encode_prompt_completion(CHAT[:2], CHAT[2:], tokenizer)
    assert trained(example, tokenizer) == "yes<|im_end|>It is 46.<|im_end|>"
    example = encode_prompt_completion(CHAT[:4], [CHAT[4], CHAT[3], CHAT[4]], tokenizer)
    assert trained(example, tokenizer) == "It is 46.<|im_end|>" * 2


def test_markers_that_stop_short_of_the_stop_token_still_train_it(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}",
        "{{- message['content'] }}{%- endgeneration %}{{- '<|im_end|>' }}",
    )
    assert trained(encode_messages(CHAT, tokenizer), tokenizer) == "yes<|im_end|>It is 46.<|im_end|>"


def test_markers_that_mark_nothing_are_an_error(tokenizer):
    unused = "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    tokenizer.chat_template = unused + without_markers(tokenizer).chat_template
    with pytest.raises(UserError, match="marks not one token as the assistant's"):
        encode_messages(CHAT, tokenizer)


@pytest.mark.parametrize("end", ["\\n", "<|im_start|>"])
def test_a_template_without_a_stop_token_gets_one(tokenizer, end):
    """Otherwise generation would never end."""
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", end)
    for examples in (
        lambda e: e.messages(CHAT),
        lambda e: e.messages(CHAT, assistant_only=False),
        lambda e: e.prompt_completion(CHAT[:4], CHAT[4:]),
    ):
        encoder = Encoder(tokenizer)
        example = examples(encoder)
        assert example.input_ids[-1] == tokenizer.eos_token_id and example.response_mask[-1]
        assert encoder.notes[NO_STOP] == 1


REASONING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last %}{{- 'maybe ' }}{%- endif %}"
    "{{- m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_a_template_that_shortens_earlier_turns_is_masked_rightly(tokenizer):
    """As reasoning templates do: the last answer carries more than the same answer would have earlier."""
    tokenizer.chat_template = REASONING
    assert trained(encode_messages(CHAT, tokenizer), tokenizer) == "yes<|im_end|>maybe It is 46.<|im_end|>"
    tokenizer.chat_template = REASONING.replace("<|im_end|>", "")
    with pytest.raises(UserError, match="renders earlier turns anew"):
        encode_messages(CHAT, tokenizer)


def test_a_prompt_that_renders_differently_alone_moves_the_boundary(tokenizer):
    """The generation prompt ends 'assistant\\nmaybe', the whole has no 'maybe': training starts where they part."""
    tokenizer.chat_template = without_markers(tokenizer).chat_template.replace("assistant\\n", "assistant\\nmaybe")
    encoder = Encoder(tokenizer)
    example = encoder.prompt_completion(CHAT[:4], CHAT[4:])
    assert trained(example, tokenizer) == "It is 46.<|im_end|>" and encoder.notes[MOVED_BOUNDARY] == 1


def test_a_template_that_writes_bos_does_not_double_it(bos_tokenizer):
    bos_tokenizer.chat_template = "{{- '<s><s>' }}" + bos_tokenizer.chat_template
    encoder = Encoder(bos_tokenizer)
    example = encoder.messages(CHAT)
    assert example.input_ids.count(bos_tokenizer.bos_token_id) == 1 and encoder.notes[DOUBLE_BOS] == 1
    assert trained(example, bos_tokenizer) == "yes<|im_end|>It is 46.<|im_end|>"


def test_every_stop_token_of_the_model_counts(tokenizer):
    """generation_config.eos_token_id may list several; a template may end with any of them."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|eot|>"]})
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    marked = encode_messages(CHAT, tokenizer, stop_ids=[tokenizer.eos_token_id, eot])
    rendered = encode_messages(CHAT, without_markers(tokenizer), stop_ids=[tokenizer.eos_token_id, eot])
    assert marked == rendered and trained(marked, tokenizer) == "yes<|eot|>It is 46.<|eot|>"
    # only <|eot|> ends this model's generations, so plain text ends with it too
    assert encode_text("apples", tokenizer, stop_ids=eot).input_ids[-1] == eot


def test_a_template_that_refuses_a_conversation_says_why(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="refuses these messages: roles must alternate"):
        encode_messages(CHAT, tokenizer)


def test_a_tokenizer_without_template_gets_the_plain_one(tokenizer):
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer)
    example = encoder.messages(CHAT[1:])
    assert encoder.notes[NO_TEMPLATE] == 1
    assert tokenizer.decode(example.input_ids) == (
        "User: Are the apples ready?\n\nAssistant: yes<|im_end|>\n\nUser: And the sum?\n\nAssistant: It is 46.<|im_end|>"
    )
    assert trained(example, tokenizer) == " yes<|im_end|> It is 46.<|im_end|>"
    assert tokenizer.decode(encode_prompt(CHAT[1:2], tokenizer)) == "User: Are the apples ready?\n\nAssistant:"


def test_chat_template_variables_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{- mood }}" + tokenizer.chat_template
    ids = encode_prompt(CHAT[:2], tokenizer, chat_template_kwargs={"mood": "yes"})
    assert tokenizer.decode(ids).startswith("yes<|im_start|>")


def test_set_chat_template(tokenizer, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ 'x' }}", encoding="utf-8")
    for given, expected in ((str(file), "{{ 'x' }}"), ("{{ 'y' }}", "{{ 'y' }}")):
        set_chat_template(tokenizer, given)
        assert tokenizer.chat_template == expected
    set_chat_template(tokenizer, "chatml")
    assert trained(encode_messages(CHAT, tokenizer), tokenizer) == "yes<|im_end|>It is 46.<|im_end|>"
    with pytest.raises(UserError, match="No chat template 'chatlm': give chatml, plain"):
        set_chat_template(tokenizer, "chatlm")


# ------------------------------------------------------------------------------------------------- limits and audit


def test_truncation_keeps_the_beginning_and_drops_what_has_no_label(tokenizer):
    example = encode_prompt_completion("12+34=", "46", tokenizer)  # 6 prompt tokens, 4, 6, stop
    assert truncate(example, 9) is example and truncate(example, None) is example
    assert trained(truncate(example, 8), tokenizer) == "46"
    assert truncate(example, 6) is None


def test_common_prefix():
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2 and common_prefix_length([], [1]) == 0


def test_a_token_beyond_the_embedding_is_refused(tokenizer):
    with pytest.raises(UserError, match="the model embeds only 50 ids"):
        encode_text("apples", tokenizer, vocab_size=50)


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        token_audit(tokenizer)
    assert encode_text("apples", tokenizer, stop_ids=2).input_ids[-1] == 2


def test_the_audit_of_a_sound_tokenizer_is_one_line(tokenizer):
    size = len(tokenizer)
    summary = (
        f"tokens: vocabulary {size}, stop '<|im_end|>' (2), pad '<pad>' (0), bos none, chat template with assistant"
    )
    assert token_audit(tokenizer, vocab_size=size) == [f"{summary} markers"]


def test_the_audit_finds_each_fault(tokenizer, bos_tokenizer):
    def findings(tokenizer, **options):
        return " | ".join(token_audit(tokenizer, **options))

    template = tokenizer.chat_template
    assert "embeds only 100" in findings(tokenizer, vocab_size=100)
    assert "not among the model's stop ids [1]" in findings(tokenizer, stop_ids=1)
    tokenizer.pad_token = tokenizer.eos_token
    assert "= eos (harmless" in findings(tokenizer)
    assert "'<s>' begins plain text but not chats" in findings(bos_tokenizer)
    tokenizer.chat_template = "{{- '<s><s>' }}" + template
    assert "the chat template writes '<s>' twice" in findings(tokenizer)
    tokenizer.chat_template = template[: template.index("{%- if add_generation_prompt")]
    assert "ignores add_generation_prompt" in findings(tokenizer)
    tokenizer.chat_template = template.replace("<|im_end|>", "#")
    assert "ends an answer with '#\\n', which is no stop token" in findings(tokenizer)
    tokenizer.chat_template = None
    assert findings(tokenizer).endswith("no chat template")
