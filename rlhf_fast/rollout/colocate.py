"""vLLM in this process, on the same GPU, behind the protocol of engines. NOT RUN: vLLM cannot be installed here.

Its calls are pinned to the documented interface of vLLM 0.10.2 and newer: ``LLM(model, dtype, seed, gpu_memory_utilization,
max_model_len, enable_lora, max_lora_rank, max_loras, enable_sleep_mode, logprobs_mode)``; ``LLM.generate(prompts,
sampling_params, use_tqdm, lora_request)`` with prompts ``{"prompt_token_ids": [...]}`` (``TokensPrompt``) and one
``SamplingParams`` for each; ``LoRARequest(name, number, folder)``, a number of its own for every version; ``sleep(level)``,
``wake_up()``, ``reset_prefix_cache()``. It holds a copy of the base and gets the adapter only. A sample j draws with
seed + j.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.completions import sampling_fields
from rlhf_fast.rollout.engine import CAPABILITIES, Request, Sample
from rlhf_fast.rollout.generate import context_length, end_of_sequence_ids
from rlhf_fast.rollout.sampling import draw_seed

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can make room for


class ColocatedEngine:
    """Continue prompts with vLLM beside the trainer.

    Args:
        policy: whose base, adapter's rank, EOS ids and context it takes over.
        allow_sleep: give vLLM's memory back while weights change.
        gpu_memory_utilization: share of the GPU that vLLM takes.
        seed: of vLLM; requests have their own.

    Raises:
        UserError: vLLM is not installed, or the policy has no adapter to be synced.
    """

    def __init__(
        self, policy: Any, *, allow_sleep: bool = False, gpu_memory_utilization: float = 0.3, seed: int = 0
    ) -> None:
        self.capabilities = CAPABILITIES if allow_sleep else CAPABILITIES - {"sleep"}
        options = engine_arguments(policy, allow_sleep, gpu_memory_utilization, seed)
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(
                f"vllm_mode colocate needs vLLM ({error}): pip install vllm, serve it elsewhere (vllm_mode server), or leave "
                "use_vllm out"
            ) from error
        self.vllm, self._lora_request = vllm, LoRARequest
        self.stop_ids = end_of_sequence_ids(policy.model, policy.tokenizer)
        self.llm = vllm.LLM(**options)
        self.adapter: Any = None
        self.version = 0

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Continue every request; entry i holds the ``n`` samples of request i."""
        requests = list(requests)
        seeds = [draw_seed() if r.seed is None else r.seed for r in requests]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(r.prompt_ids)} for r in requests],
            [self.vllm.SamplingParams(**sampling_fields(r, s, self.stop_ids)) for r, s in zip(requests, seeds)],
            use_tqdm=False,
            lora_request=self.adapter,
        )
        return [read_output(output, self.version) for output in outputs]

    def update(self, adapter_dir: str | Path | None, version: int) -> None:
        """Write with the adapter in a folder from now on."""
        if adapter_dir is None:
            raise UserError("rollout: vLLM does not share the trainer's weights; pass the folder of an adapter")
        # numbers start at 1, and a number that was used stands for the weights that it stood for
        self.adapter = self._lora_request(f"policy-v{version}", version + 1, str(Path(adapter_dir).resolve()))
        self.version = version
        self.reset_cache()

    def reset_cache(self) -> None:
        """Forget every cached prefix."""
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Move vLLM's weights to the host and drop its cache."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        self.llm.wake_up()


def engine_arguments(policy: Any, allow_sleep: bool, gpu_memory_utilization: float, seed: int) -> dict[str, Any]:
    """The arguments of ``vllm.LLM`` that make it write as ``policy`` does.

    Raises:
        UserError: the policy has no adapter, one of a rank that vLLM has no room for, or a base without a name.
    """
    if not policy.adapters.names:
        raise UserError("vllm_mode colocate syncs an adapter, and this run trains all weights: add use_peft")
    name, rank = policy.model.name_or_path, policy.adapters.config(policy.role).r
    if not name:
        raise UserError("vllm_mode colocate loads the base by its name; give the model as a name or a folder")
    if rank > LORA_RANKS[-1]:
        raise UserError(f"vLLM has room for LoRA ranks up to {LORA_RANKS[-1]}, and lora_r is {rank}; lower it")
    options = {
        "model": name,
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "seed": seed,
        "gpu_memory_utilization": gpu_memory_utilization,
        "enable_lora": True,
        "max_lora_rank": next(r for r in LORA_RANKS if r >= rank),
        "max_loras": 1,
        "enable_sleep_mode": allow_sleep,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature, as Sample.logprobs are
    }
    context = context_length(policy.model)
    return options if context is None else {**options, "max_model_len": context}


def read_output(output: Any, version: int) -> list[Sample]:
    """The samples in one of vLLM's ``RequestOutput``: each token's entry of ``logprobs`` maps ids to ``Logprob``."""
    samples = []
    for part in sorted(output.outputs, key=lambda part: part.index):
        logprobs = [entry[token].logprob for token, entry in zip(part.token_ids, part.logprobs, strict=True)]
        samples.append(Sample(list(part.token_ids), logprobs, part.finish_reason, version))
    return samples
