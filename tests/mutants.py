"""Seeded mistakes in what trainers rest on, as data: each changes one place, and every test named beside it must notice.

The details of ``README.md`` come first, by topic: each of the tests that prove one is named by a mutant at least. Then the
numbers that each trainer is about. ``test_mutants.py`` applies them one at a time to a copy of the project. A text must occur
exactly once in its file, so that rewritten code brings its mutants along. The kernels have a list of their own.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    topic: str  # a detail of README.md, or a trainer
    file: str  # under rlhf_fast/
    old: str
    new: str
    killers: tuple[str, ...]  # tests under tests/, each of which must fail

    @property
    def name(self) -> str:
        return f"{self.topic}, {self.file}: {' '.join(self.old.split())[:60]}"


def of(topic: str, *mutants: tuple) -> tuple[Mutant, ...]:
    return tuple(Mutant(topic, file, old, new, killers) for file, old, new, *killers in mutants)


TEMPLATES, PREPARE = "data/test_templates.py::test_", "data/test_prepare.py::test_"
SFT, REWARD, DPO, KTO = (f"trainers/test_{name}.py::test_" for name in ("sft", "reward", "dpo", "kto"))
PPO, GRPO, SAFE, RL = (f"trainers/test_{name}.py::test_" for name in ("ppo", "grpo", "safe_ppo", "rl"))
FAMILY, SCORES, GROUPS = (f"trainers/test_{name}.py::test_" for name in ("dpo_family", "scores", "groups"))
COSTS, IMPORTANCE, PROGRESS = (f"trainers/test_{name}.py::test_" for name in ("lagrangian", "importance", "progress"))
REFERENCE, SETTINGS = (f"trainers/test_{name}.py::test_" for name in ("reference", "settings"))
PAIRS, POLICY = "losses/test_preference.py::test_", "losses/test_policy.py::test_"
MODEL, ADAPTERS, ENGINES = (
    "models/test_policy.py::test_",
    "models/test_adapters.py::test_",
    "rollout/test_engines.py::test_",
)
HAND, RATIOS = (
    f"{PPO}{what}_of_three_tokens_equal_hand_numbers"
    for what in ("rewards_advantages_and_returns", "ratios_and_losses")
)
SPLIT = "trainers/test_accumulation.py::test_how_a_window_is_split_changes_nothing"
PROCESSES = "trainers/test_processes.py::test_two_processes_make_the_steps_of_one"

DETAILS = (
    *of(
        "prompt boundary",
        (
            "data/templates.py",
            "            self.notes[MOVED_BOUNDARY] += 1\n        return start",
            "            self.notes[MOVED_BOUNDARY] += 1\n        return len(prompt_ids)",
            TEMPLATES + "a_token_that_merges_across_the_boundary_is_trained_and_noted",
            TEMPLATES + "a_prompt_that_renders_differently_alone_moves_the_boundary",
        ),
        (
            "data/templates.py",
            "        if start < len(prompt_ids):\n            self.notes",
            "        if start <= len(prompt_ids):\n            self.notes",
            TEMPLATES + "a_clean_boundary_is_not_noted",
        ),
    ),
    *of(
        "chat templates",
        (
            "data/templates.py",
            "mask[start:end] = [True] * (end - start)",
            "mask[start + 1 : end] = [True] * (end - start - 1)",
            TEMPLATES + "markers_and_rendering_message_by_message_give_the_same_mask",
        ),
        ("data/templates.py", "if not any(mask):", "if False:", TEMPLATES + "markers_that_mark_nothing_are_an_error"),
        (
            "data/templates.py",
            "mask[i] = ids[i - 1] not in self.stop_ids",
            "mask[i] = False",
            TEMPLATES + "markers_that_stop_short_of_the_stop_token_still_train_it",
        ),
        (
            "data/templates.py",
            "            ids.pop()",
            "            pass",
            TEMPLATES + "bos_and_eos_of_the_tokenizer_are_neither_lost_nor_doubled",
        ),
        (
            "data/templates.py",
            "if prompt == encoder._one_bos(raw):",
            "if False:",
            TEMPLATES + "the_audit_finds_each_fault",
        ),
    ),
    *of(
        "packing",
        (
            "models/attention.py",
            "cls(batch.spans, batch.input_ids.device, implementation)",
            "cls([Span(0, len(batch.input_ids))], batch.input_ids.device, implementation)",
            MODEL + "documents_do_not_see_each_other",
        ),
        (
            "data/batch.py",
            "mask[[start for start, length, s in zip(starts, lengths, shared) if length and not s]] = False",
            "mask[:1] = False",
            PREPARE + "rows_packed_together_train_no_first_token_and_restart_positions",
        ),
        (
            "data/batch.py",
            "[p for x in spans for p in range(x.prefix_length, x.prefix_length + x.length)]",
            "[p for x in spans for p in range(x.start, x.start + x.length)]",
            PREPARE + "rows_packed_together_train_no_first_token_and_restart_positions",
        ),
        (
            "trainers/sft.py",
            "-weighted.sum() / window.tokens",
            "-weighted.sum() / window.records",
            SFT + "the_loss_is_the_mean_cross_entropy_of_completion_tokens",
        ),
    ),
    *of(
        "truncation",
        (
            "data/templates.py",
            "mask, example.weight) if any(mask) else None",
            "mask, example.weight)",
            PREPARE + "truncation_is_reported_and_rows_without_label_are_dropped",
        ),
        (
            "data/prepare.py",
            "if share > self._allowed:",
            "if share > 1.0:",
            PREPARE + "more_than_one_percent_shortened_rows_are_refused",
            SETTINGS + "too_long_rows_are_refused_then_cut_on_request",
        ),
    ),
    *of(
        "EOS",
        (
            "rollout/generate.py",
            "    return sorted(ids)\n",
            "    return sorted(ids)[:1]\n",
            ENGINES + "every_eos_id_ends_a_sample_and_is_kept",
        ),
        (
            "data/templates.py",
            "isinstance(stop_ids, int) else list(stop_ids or ())",
            "isinstance(stop_ids, int) else list(stop_ids or ())[:1]",
            TEMPLATES + "every_stop_token_of_the_model_counts",
        ),
        (
            "data/templates.py",
            "            mask[0] = False  #",
            "            mask = [m and t != self.tokenizer.pad_token_id for t, m in zip(ids, mask)]  #",
            TEMPLATES + "pad_equal_to_eos_leaves_the_stop_token_trained",
        ),
    ),
    *of(
        "reward pooling",
        (
            "models/policy.py",
            "[batch.cu_seqlens[1:].long() - 1]",
            "[batch.cu_seqlens[:-1].long()]",
            MODEL + "values_are_of_the_state_before_the_token_and_scores_of_the_last_token",
            "rewards/test_model.py::test_scores_are_those_of_the_sampled_ids",
            "trainers/test_shared_prefix.py::test_a_reward_model_scores_a_group_as_it_scores_each",
        ),
    ),
    *of(
        "score head",
        (
            "models/policy.py",
            'if k.startswith(f"{self.role}.")}',
            "if False}",
            MODEL + "a_reward_model_keeps_its_head_through_save_and_load",
            REWARD + "a_saved_reward_model_gives_the_same_scores",
        ),
        (
            "models/policy.py",
            "        if wrong:\n            raise OSError",
            "        if False:\n            raise OSError",
            "models/test_four_bit.py::test_a_file_that_reads_back_otherwise_is_noticed",
        ),
    ),
    *of(
        "value head",
        (
            "models/policy.py",
            "self.heads[role](hidden[batch.predictor_rows])",
            "self.heads[role](hidden[batch.response_rows])",
            MODEL + "values_are_of_the_state_before_the_token_and_scores_of_the_last_token",
        ),
        (
            "trainers/ppo.py",
            "if self.step >= a.critic_warmup_steps:",
            "if True:",
            PPO + "critic_warmup_trains_the_critic_alone",
        ),
        ("trainers/ppo.py", "clip=a.cliprange_value,", "clip=None,", RATIOS),
        (
            "trainers/ppo.py",
            "yield a.vf_coef * loss",
            "yield 0.0 * loss",
            PPO + "the_critic_comes_to_explain_the_returns",
        ),
    ),
    *of(
        "advantages",
        (
            "../kernels/advantages/reference.py",
            "centred = torch.where(mask, x - mean, 0.0)",
            "centred = torch.where(mask, x, 0.0)",
            "kernels/test_advantages.py::test_whiten_by_hand",
        ),
        ("trainers/ppo.py", "advantages = whiten_over_ranks(advantages, mask, self.ranks)", "pass", HAND),
        (
            "trainers/scores.py",
            "count, total = ranks.sum(len(chosen), float(chosen.sum()))",
            "count, total = len(chosen), float(chosen.sum())",
            SCORES + "whitening_over_processes_is_that_of_all_their_tokens",
        ),
    ),
    *of(
        "KL",
        (
            "trainers/ppo.py",
            'pricing = {"kl_coef": kl_coef,',
            'pricing = {"kl_coef": 0.0,',
            PPO + "every_setting_of_the_rewards_changes_them_as_it_says",
            HAND,
        ),
        (
            "trainers/ppo.py",
            "kl_coef=a.beta,",
            "kl_coef=0.0,",
            PPO + "three_passes_take_the_steps_of_the_formulas",
            RATIOS,
        ),
        (
            "trainers/grpo.py",
            "(a.kl_coef * kl_of(e) if a.kl_coef else 0.0)",
            "0.0",
            GRPO + "a_price_of_the_kl_in_the_reward_is_paid_before_the_baseline",
        ),
        (
            "losses/policy.py",
            "kl * log_ratio.clamp(max=LOG_MOST).exp(), mask",
            "kl * log_ratio.clamp(max=LOG_MOST).exp().detach(), mask",
            POLICY + "the_unbiased_kl_has_the_kl_s_gradient_under_any_policy_that_sampled",
        ),
    ),
    *of(
        "accumulation",
        (
            "trainers/loop.py",
            "for loss, metrics, weight in trainer.losses(part, window):",
            "for loss, metrics, weight in trainer.losses(part, trainer.own_window(part)):",
            SPLIT,
        ),
        (
            "trainers/loop.py",
            "trainer.accelerator.backward(loss * world)",
            "trainer.accelerator.backward(loss)",
            PROCESSES,
        ),
    ),
    *of(
        "old logprobs",
        (
            "trainers/rl.py",
            "temperature=self.args.temperature)",
            "temperature=self.args.temperature * 1.001)",
            GRPO + "the_first_ratio_is_exactly_1",
        ),
        (
            "trainers/importance.py",
            "    if gap > most:",
            "    if False:",
            IMPORTANCE + "an_engine_in_this_process_that_is_off_raises_the_alarm",
        ),
        (
            "rollout/engine.py",
            "(top_p, top_p == 1.0, ",
            "(top_p, True, ",
            "rollout/test_engine.py::test_rl_refuses_sampling_from_another_distribution",
        ),
        (
            "rollout/sampling.py",
            "(logits / divisor if settings.tempered else logits)",
            "(logits)",
            ENGINES + "logprobs_are_those_of_teacher_forcing_at_the_sampling_temperature",
        ),
    ),
    *of(
        "reference",
        (
            "models/policy.py",
            "self.adapters.use(role if role in self.adapters.names else None)",
            "self.adapters.use(role if role in self.adapters.names else self.role)",
            ADAPTERS + "the_reference_of_a_fresh_adapter_is_the_base_bit_for_bit",
        ),
        (
            "models/load.py",
            "policy.continued = True",
            "policy.continued = False",
            ADAPTERS + "the_reference_of_a_continued_adapter_is_that_adapter_frozen",
            DPO + "a_continued_adapter_is_its_own_reference",
        ),
    ),
    *of(
        "dropout",
        ("models/load.py", "module.p = 0.0", "pass", SETTINGS + "no_dropout_is_left_outside_supervised_fine_tuning"),
        (
            "models/load.py",
            "setattr(module, name, 0.0)",
            "pass",
            SETTINGS + "dropout_of_models_that_keep_a_bare_number_is_turned_off_too",
        ),
    ),
    *of(
        "unscorable, zero variance",
        (
            "trainers/grpo.py",
            "return math.isnan(record.reward) or (",
            "return (",
            GRPO + "the_loss_with_unscored_responses_is_that_without_them",
        ),
        (
            "trainers/groups.py",
            "r = torch.tensor(rewards, dtype=torch.float32)",
            "r = torch.tensor(rewards, dtype=torch.float32).nan_to_num()",
            GRPO + "an_unscored_response_is_in_no_baseline_and_teaches_nothing",
        ),
        (
            "trainers/groups.py",
            "return group_advantages(r, group_size, scale=scale, baseline=baseline).tolist()",
            "return r.nan_to_num().tolist()",
            GRPO + "groups_without_two_different_rewards_move_no_weight",
            GRPO + "advantages_equal_hand_numbers",
        ),
        (
            "trainers/grpo.py",
            "alike = (deviations < ALIKE)",
            "alike = (deviations < 0.0)",
            GRPO + "groups_scored_all_alike_give_way_to_further_prompts",
        ),
        (
            "trainers/scores.py",
            "e.reward, e.example.response_mask = 0.0, [False] * len(e.example)",
            "e.reward = 0.0",
            PPO + "an_unscored_response_might_as_well_not_exist",
        ),
    ),
    *of(
        "overlong",
        (
            "trainers/grpo.py",
            "(self.args.mask_truncated_completions and not record.finished)",
            "False",
            GRPO + "truncated_responses_can_be_left_out",
        ),
        (
            "trainers/scores.py",
            "e.reward -= min(over / cache, 1.0)",
            "e.reward -= 1.0",
            RL + "soft_overlong_punishment_follows_equation_13",
        ),
        (
            "trainers/scores.py",
            "            e.reward -= penalty",
            "            pass",
            PPO + "every_setting_of_the_rewards_changes_them_as_it_says",
        ),
    ),
    *of(
        "DPO",
        (
            "trainers/dpo.py",
            "sums = response_logprobs(self, records)\n",
            "sums = [s[::-1] for s in response_logprobs(self, records)]\n",
            DPO + "before_the_first_step_the_loss_is_exactly_ln_2",
        ),
        (
            "losses/preference.py",
            '_kernel("sigmoid", w / p.chosen_tokens, l / p.rejected_tokens, c)',
            '_kernel("sigmoid", w, l, c)',
            PAIRS + "every_row_is_its_papers_formula",
        ),
        (
            "trainers/reference.py",
            "            digest.update(_bytes(example))",
            "            pass",
            REFERENCE + "anything_that_they_follow_from_makes_them_stale",
        ),
    ),
    *of(
        "RM losses",
        (
            "trainers/reward.py",
            "scores[:, 1], margin=margin, center=center)",
            "scores[:, 1], center=center)",
            REWARD + "a_pairs_loss_has_the_margin_inside_and_the_centring_outside",
        ),
        (
            "trainers/reward.py",
            "center = self.args.center_rewards_coefficient",
            "center = 0.0",
            REWARD + "centring_keeps_scores_around_zero",
        ),
    ),
    *of(
        "hand numbers",
        ("trainers/ppo.py", '"gamma": a.gamma, "lam": a.lam,', '"gamma": a.lam, "lam": a.gamma,', HAND),
        ("trainers/ppo.py", "clip_low=a.cliprange,", "clip_low=0.4,", RATIOS),
        (
            "trainers/grpo.py",
            "denominator=divisors[LOSS_TYPES[a.loss_type].divisor]",
            "denominator=window.tokens",
            GRPO + "losses_of_three_tokens_equal_hand_numbers",
        ),
    ),
    *of(
        "schedule",
        (
            "trainers/progress.py",
            "        if self.max_steps > 0:\n            return step\n",
            "        if True:\n            return step\n",
            PROGRESS + "the_schedule_goes_on_where_ppo_drops_passes",
            PROGRESS + "the_schedule_goes_on_where_prompts_are_replaced",
        ),
    ),
)

TRAINERS = (
    *of(
        "loop",
        (
            "trainers/trainer.py",
            "self.ranks.sum(*self.counts(records))",
            "self.counts(records)",
            PROCESSES,
        ),
        (
            "trainers/evaluation.py",
            "window = trainer.window(mine)",
            "window = trainer.own_window(mine[:1])",
            SFT + "accuracy_entropy_and_evaluation_are_those_of_the_logits",
        ),
        (
            "trainers/evaluation.py",
            "for loss, figures, weight in trainer.losses(part, window):",
            "for loss, figures, weight in trainer.losses(part, trainer.own_window(part)):",
            KTO + "an_evaluation_is_over_all_rows_whatever_the_batch_size",
            FAMILY + "an_evaluation_is_over_all_rows_whatever_the_batch_size",
        ),
        (
            "trainers/progress.py",
            "            rounds = math.ceil(rounds)",
            "            pass",
            PROGRESS + "a_schedule_by_hand",
        ),
    ),
    *of(
        "sft",
        (
            "trainers/sft.py",
            "logprobs * logprobs.detach().exp()",
            "logprobs * logprobs.exp()",
            SFT + "dft_weighs_each_token_by_its_probability",
        ),
        (
            "trainers/sft.py",
            "logprobs if batch.weights is None else logprobs * batch.weights",
            "logprobs",
            SFT + "weights_scale_tokens_and_their_share_of_the_mean",
        ),
        (
            "trainers/sft.py",
            "return sum(e.weight * sum(e.response_mask[1:]) for e in record)",
            "return sum(sum(e.response_mask[1:]) for e in record)",
            SFT + "tiny_weights_do_not_shrink_the_loss",
        ),
    ),
    *of(
        "reward",
        (
            "trainers/reward.py",
            "yield losses / window.records,",
            "yield losses / len(records),",
            SPLIT,
        ),
        (
            "trainers/reward.py",
            "losses = torch.where(exists[:, 2], ranked_reward_loss(scores, exists), losses)",
            "pass",
            REWARD + "rankings_have_the_plackett_luce_loss_and_pairs_among_them_that_of_pairs",
        ),
        (
            "trainers/reward.py",
            "weights = (weights * torch.tensor([r.weight for r in records])).to(flat.device)",
            "weights = weights.to(flat.device)",
            REWARD + "rows_count_by_their_weight",
        ),
        (
            "trainers/reward.py",
            'return -1.0 if self.args.kind == "cost" else 1.0',
            "return 1.0",
            "trainers/test_cost_model.py",
        ),
    ),
    *of(
        "dpo",
        (
            "trainers/dpo.py",
            "total = total + weight * (weights * row.formula(pairs, self.args.coefficients)).sum()",
            "total = total + weight * row.formula(pairs, self.args.coefficients).sum()",
            FAMILY + "a_row_counts_by_its_weight",
            FAMILY + "pairs_weigh_what_the_policy_itself_would_write",
        ),
        (
            "trainers/dpo.py",
            "yield total / window.records,",
            "yield total / len(records),",
            FAMILY + "no_loss_depends_on_the_split_into_micro_batches",
        ),
        (
            "trainers/dpo.py",
            "coupling[:, 1:] * (sums - sums.detach())",
            "coupling[:, :1] * (sums - sums.detach())",
            FAMILY + "sorting_learns_from_margins_in_the_reference_s_order",
        ),
        (
            "trainers/dpo.py",
            "-plain[:, 0] * window.records / window.chosen_tokens",
            "-plain[:, 0] / pairs_tokens[0]".replace("pairs_tokens", "tokens"),
            FAMILY + "losses_without_a_reference_are_their_formulas_and_never_run_one",
        ),
        (
            "trainers/dpo.py",
            "shift = float(self.rewards[0] / self.rewards[1].clamp(min=1))",
            "shift = 0.0",
            FAMILY + "bco_s_loss_is_of_rewards_less_that_mean",
        ),
        (
            "losses/preference.py",
            "((sharpened - logprobs.detach()) / tokens)",
            "((sharpened - logprobs.detach()) / tokens.sum())",
            PAIRS + "a_pair_weighs_what_its_tokens_are_to_the_average_one",
            FAMILY + "pairs_weigh_what_the_policy_itself_would_write",
        ),
        (
            "losses/preference.py",
            "torch.where(place <= shared, 1.0, alpha)",
            "torch.where(place < shared, 1.0, alpha)",
            PAIRS + "tokens_beyond_the_shorter_response_are_discounted",
            FAMILY + "the_discount_of_the_longer_response_reaches_every_pass",
        ),
        (
            "trainers/figures.py",
            "return beta * chosen.detach(), beta * rejected.detach()",
            "return chosen.detach(), rejected.detach()",
            DPO + "two_steps_equal_the_formula_on_plain_transformers",
        ),
    ),
    *of(
        "kto",
        (
            "trainers/kto.py",
            "kl=max(total / count, 0.0)",
            "kl=0.0",
            KTO + "three_steps_equal_the_formula_on_plain_transformers",
        ),
        (
            "trainers/kto.py",
            "torch.where(good, a.desirable_weight, a.undesirable_weight)",
            "torch.where(good, a.undesirable_weight, a.desirable_weight)",
            KTO + "three_steps_equal_the_formula_on_plain_transformers",
        ),
        (
            "trainers/kto.py",
            ".sum() / window.records,",
            ".sum() / len(records),",
            KTO + "the_split_into_micro_batches_changes_nothing",
        ),
        (
            "data/prepare.py",
            "if prompt != prompts[i - 1] or prompts[other] == prompt:",
            "if True:",
            KTO + "a_mismatched_response_answers_another_prompt",
        ),
        (
            "losses/preference.py",
            "torch.where(desirable, -beta, beta) * (ratio - kl)",
            "torch.where(desirable, -beta, beta) * (ratio + kl)",
            PAIRS + "kto_by_hand",
        ),
    ),
    *of(
        "grpo",
        (
            "trainers/grpo.py",
            "if not math.isnan(e.reward)])",
            "])",
            GRPO + "the_loss_with_unscored_responses_is_that_without_them",
        ),
        (
            "trainers/grpo.py",
            "mask = batch.response_mask & kept.repeat_interleave(torch.tensor(batch.lengths)).to(self.policy.device)",
            "mask = batch.response_mask",
            GRPO + "truncated_responses_can_be_left_out",
        ),
        (
            "trainers/grpo.py",
            "            beta=a.beta,",
            "            beta=0.0,",
            GRPO + "every_loss_type_takes_the_steps_of_its_formula",
        ),
        (
            "trainers/grpo.py",
            "unbiased=a.use_bias_correction_kl,",
            "unbiased=True,",
            GRPO + "the_bias_correction_of_the_kl_can_be_left_out",
        ),
        (
            "trainers/grpo.py",
            "old = a.num_iterations > 1 or bool(a.kl_coef) or self.corrects",
            "old = False",
            GRPO + "every_loss_type_takes_the_steps_of_its_formula",
        ),
        (
            "trainers/grpo.py",
            '"limit": window.records * a.max_completion_length,',
            '"limit": window.records,',
            GRPO + "losses_of_three_tokens_equal_hand_numbers",
        ),
        (
            "losses/policy.py",
            "dual_clip=o.delta,",
            "dual_clip=None,",
            GRPO + "delta_bounds_the_ratio_where_the_advantage_is_negative",
        ),
        (
            "losses/policy.py",
            "clip_high=o.epsilon_high,",
            "clip_high=None,",
            GRPO + "losses_of_three_tokens_equal_hand_numbers",
        ),
        (
            "losses/policy.py",
            '"token" if row.kind == "reinforce" else o.importance_sampling_level',
            '"token"',
            GRPO + "sequence_ratios_take_the_steps_of_their_formula",
        ),
        (
            "losses/policy.py",
            "advantages = advantages * row.gate(",
            "advantages = row.gate(",
            POLICY + "a_gated_loss_is_its_paper_s_on_every_backend",
        ),
        (
            "losses/policy.py",
            "row.gate(logprobs.detach() - old_logprobs,",
            "row.gate(old_logprobs - logprobs.detach(),",
            POLICY + "a_gated_loss_is_its_paper_s_on_every_backend",
        ),
        (
            "losses/policy.py",
            "tau = torch.where(advantages > 0,",
            "tau = torch.where(advantages < 0,",
            POLICY + "sapo_s_gate_makes_the_gradient_of_its_loss",
        ),
        (
            "losses/policy.py",
            "torch.exp(k * log_w + decay * (1 - log_w.exp()))",
            "torch.exp(k * log_w - decay * (1 - log_w.exp()))",
            POLICY + "vespo_s_gate_is_one_number_a_response",
        ),
        (
            "trainers/groups.py",
            "(advantages - (weights * advantages).sum())",
            "advantages",
            GROUPS + "whitened_advantages_equal_hand_numbers",
        ),
        (
            "trainers/groups.py",
            "return (squares / (scored - 1).clamp(min=1)).sqrt()",
            "return (squares / scored.clamp(min=1)).sqrt()",
            GRPO + "group_metrics_look_at_what_was_scored",
        ),
    ),
    *of(
        "ppo",
        ("trainers/ppo.py", "entropy_coef=a.entropy_coef,", "entropy_coef=0.0,", RATIOS),
        ("trainers/ppo.py", "yield a.vf_coef * loss", "yield loss", RATIOS),
        (
            "trainers/ppo.py",
            "clip=a.cliprange_value,\n                denominator=window.tokens,",
            "clip=a.cliprange_value,\n                denominator=tokens,",
            SPLIT,
        ),
        (
            "trainers/ppo.py",
            "if self.args.target_kl is not None and self.moved > self.args.target_kl:",
            "if False:",
            PPO + "a_policy_that_moved_target_kl_drops_the_rest_of_its_passes",
            PROGRESS + "the_schedule_goes_on_where_ppo_drops_passes",
        ),
        (
            "trainers/ppo.py",
            "self.kl_coef *= kl_factor(",
            "kl_factor(",
            PPO + "the_adaptive_coefficient_moves_as_in_equation_8",
        ),
        (
            "trainers/ppo.py",
            "self.ranks, shift_mean=False)",
            "self.ranks, shift_mean=True)",
            PPO + "every_setting_of_the_rewards_changes_them_as_it_says",
        ),
        (
            "trainers/ppo.py",
            "order = torch.randperm(count).tolist()",
            "order = [0] * count",
            PPO + "mini_batches_cover_every_response_once_in_each_pass",
        ),
        ("trainers/figures.py", "(rewards.sum() - scores.sum()) / count", "rewards.sum() / count", HAND),
        ("trainers/figures.py", "1 - (returns - values).var(", "(returns - values).var(", HAND),
        (
            "trainers/scores.py",
            "min(max(error, -0.2), 0.2)",
            "error",
            PPO + "the_adaptive_coefficient_moves_as_in_equation_8",
        ),
        (
            "trainers/scores.py",
            "self.squares += squares + shift**2 * self.count * count / both",
            "self.squares += squares",
            SCORES + "scores_are_normalised_by_all_that_was_seen_so_far",
        ),
        (
            "trainers/scores.py",
            "min(max(reward * self.scale, -limit), limit)",
            "min(max(reward, -limit), limit) * self.scale",
            SCORES + "scores_are_scaled_and_then_cut",
        ),
    ),
    *of(
        "importance",
        (
            "trainers/importance.py",
            "difference = (old - rollout).nan_to_num(0.0)",
            "difference = (rollout - old).nan_to_num(0.0)",
            IMPORTANCE + "weights_equal_hand_numbers",
        ),
        (
            "trainers/importance.py",
            "e.advantages = e.advantages * weight",
            "pass",
            IMPORTANCE + "advantages_are_weighed_and_nothing_else",
        ),
    ),
    *of(
        "safe ppo",
        (
            "trainers/safe_ppo.py",
            "costs, values, -self.kl_coef)",
            "costs, values, self.kl_coef)",
            SAFE + "advantages_by_hand",
        ),
        (
            "rewards/experience.py",
            "            total = total.masked_fill(cost.isnan(), torch.nan)",
            "            pass",
            SAFE + "a_fault_of_the_cost_masks_its_response_alone",
            COSTS + "a_response_whose_cost_nobody_knows_teaches_nothing",
        ),
        (
            "trainers/lagrangian.py",
            "(reward - self.value * cost) / (1 + self.value)",
            "reward - self.value * cost",
            COSTS + "lambda_follows_equation_31_by_hand",
            COSTS + "a_group_is_compared_by_reward_less_priced_cost",
        ),
        (
            "trainers/lagrangian.py",
            "a.lambda_lr * self.value * (",
            "a.lambda_lr * (",
            COSTS + "lambda_follows_equation_31_by_hand",
        ),
        (
            "trainers/lagrangian.py",
            "if step >= a.lambda_warmup_steps:",
            "if True:",
            COSTS + "lambda_stays_within_its_limits_and_where_it_is_while_it_warms_up",
        ),
    ),
)

MUTANTS = (*DETAILS, *TRAINERS)
