"""Noise on the embeddings while a policy is fine-tuned (NEFTune, Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlhf_fast.data.batch import TokenBatch


@contextlib.contextmanager
def embedding_noise(embeddings: nn.Module, batch: TokenBatch, alpha: float) -> Iterator[None]:
    """Within the block, passes of ``batch`` read embeddings with uniform noise of at most ``alpha / sqrt(L * D)``.

    L is the length of the token's own example, not of the packed row: noise is what it would be without packing. The hook
    is gone after the block, so that whatever else shares the embeddings (a reference, an evaluation) reads them clean.
    """
    lengths = [rows + shared for rows, shared in zip(batch.lengths, batch.shared)]
    of_row = torch.tensor(lengths, dtype=torch.float32).repeat_interleave(torch.tensor(batch.lengths))

    def add(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        size = alpha / (of_row.to(output.device) * output.shape[-1]).sqrt()
        noise = torch.rand_like(output, dtype=torch.float32) * 2 - 1
        return output + (noise * size[:, None]).to(output.dtype)

    handle = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
