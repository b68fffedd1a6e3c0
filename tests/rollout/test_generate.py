"""What only the engine over ``transformers.generate`` does: batches."""

from __future__ import annotations

from rlhf_fast.rollout import GenerateEngine, Request

PROMPTS = [[5], [7, 9, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 13], [20, 0, 21, 0, 22]]


def test_each_prompt_is_prefilled_once_and_finished_samples_leave_the_batch(make_policy):
    """Shapes that the model really sees, with gradient checkpointing and use_cache=False left on by a trainer."""
    policy = make_policy()
    policy.model.gradient_checkpointing_enable()
    policy.model.config.use_cache = False
    policy.train()
    seen = []
    policy.model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
    samples = GenerateEngine(policy).generate(
        [Request(p, n=16, max_new_tokens=40, temperature=3.0, seed=1) for p in PROMPTS]
    )
    assert seen[0] == (5, 9)  # 5 prompts, padded to the longest
    assert seen[1][0] == 80 and all(length == 1 for _, length in seen[1:])  # then 80 samples, one token at a time
    rows = [count for count, _ in seen[1:]]
    alive = [sum(len(s.ids) > t for g in samples for s in g) for t in range(1, len(seen))]
    assert rows == sorted(rows, reverse=True) and rows[-1] < 80
    assert all(a <= r < a / 0.75 + 1 for r, a in zip(rows, alive))


def test_progress_counts_every_sample_once(policy):
    counts = []
    GenerateEngine(policy, max_batch_size=4, progress=counts.append).generate([Request(p, n=2) for p in PROMPTS])
    assert counts == [3, 6, 10]  # 10 samples in three even batches
