"""The policy and everything else that shares its base: critic, reward model, reference. The one fusion seam.

A pass runs the body to hidden states, takes only the rows that predict a response token, and hands them with the head's
weight to ``linear_logprobs``: logits never exist. The shift by one (what precedes token t predicts it,
``TokenBatch.predictor_rows``) is used here and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import linear_logprobs

from .adapters import Adapters
from .attention import Segments, generation_attention, use_packed_attention
from .checkpointing import HostInputs, checkpoint_layers
from .fingerprint import fingerprint
from .fusion import Fusion, describe, fuse, unfuse
from .heads import ScalarHead

ROLE_FILE = "rlhf_fast.json"
HEADS_FILE = "heads.safetensors"
READ_BACK = "read_back"  # the role of what was just saved, while it is compared


class Policy(nn.Module):
    """A causal language model in several roles: "policy", "reference", "value", "reward".

    With LoRA a role is an adapter on the one frozen base, and a role without an adapter is the base itself. In full
    fine-tuning a role besides the policy is a copy of the whole model. Scalar heads are one per role, in fp32.

    Args:
        model: a transformers causal LM, plain (adapters are added through ``adapters`` or ``add_role``).
        tokenizer: its tokenizer.
        role: what the model's own weights (or first adapter) were trained for, "policy" or "reward".
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, role: str = "policy"):
        super().__init__()
        self.model = model
        self.native_attention = use_packed_attention(model)
        self.tokenizer = tokenizer
        self.role = role
        self._base: dict[str, str] | None = None  # see note_base
        self.loaded = ""  # what loading did, in one line
        self.continued = False  # the policy started from a trained adapter, which is then the reference
        self.compute_dtype: torch.dtype | None = None  # of every pass, where it is not that of the weights
        self.attention = "auto"  # implementation of attention in every pass, see models.attention
        self.fused = True
        fuse_again = weakref.WeakMethod(self._fuse)  # no cycle: a dropped policy gives its memory back at once
        self.adapters = Adapters(model, on_change=lambda: (method := fuse_again()) and method())
        self.host_inputs: HostInputs | None = None  # where checkpointed layers keep their inputs, if not on the device
        self.copies = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._fuse()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def reference(self) -> str:
        """What plays the reference, in words."""
        if "reference" in self.copies:
            return "a frozen copy of the starting weights"
        return "the frozen starting adapter" if "reference" in self.adapters.names else "the base, adapters off"

    @property
    def base(self) -> dict[str, str]:
        """The fingerprint of the frozen base."""
        return self._base or fingerprint(self.model)

    def note_base(self) -> None:
        """Take the fingerprint of the base once and for all: before its weights are sharded, for one."""
        self._base = fingerprint(self.model)

    @property
    def layer_classes(self) -> set[str]:
        """Names of the classes of the model's decoder layers."""
        # some models name those of their relatives too
        return {type(module).__name__ for module in self.model.modules()} & set(self.model._no_split_modules or ())

    @property
    def has_reference(self) -> bool:
        """Whether something plays the reference: it was added, or it is the base of a fresh adapter."""
        added = "reference" in self.copies or "reference" in self.adapters.names
        return added or (bool(self.adapters.names) and not self.continued)

    @property
    def stop_ids(self) -> list[int]:
        """Every token that ends a response: all of the generation config's, else the tokenizer's."""
        return stop_ids(self.model.generation_config, self.tokenizer)

    # ---- roles

    def add_role(self, role: str, *, trainable: bool, head: bool = False) -> None:
        """Give ``role`` weights of its own, starting from the policy's: an adapter, or a copy of the model."""
        if self.adapters.names:
            self.adapters.add(role, self.adapters.config(self.role), trainable=trainable, copy_of=self.role)
        else:
            twin = copy.deepcopy(self.model).requires_grad_(trainable)
            self.copies[role] = twin
        if head:
            self.add_head(role)

    def add_reference(self) -> None:
        """Freeze the starting policy as the reference. A fresh LoRA adapter needs no copy: its start is the base."""
        if not self.adapters.names or self.continued:
            self.add_role("reference", trainable=False)

    def add_head(self, role: str, count: int = 1) -> None:
        """A fresh scalar head for ``role``, or an ensemble of ``count``."""
        self.heads[role] = ScalarHead(self.hidden_size, count=count).to(self.device)

    def model_for(self, role: str) -> PreTrainedModel:
        """The model in ``role``, its adapter switched on. Refused while another adapter's graph is alive.

        Raises:
            ValueError: nothing plays the role.
        """
        if role in self.copies:
            return self.copies[role]
        base_is_reference = role == "reference" and self.adapters.names and not self.continued
        if role not in (self.role, *self.adapters.names, *self.heads) and not base_is_reference:
            known = sorted({self.role, *self.adapters.names, *self.copies, *self.heads})
            raise ValueError(
                f"nothing plays the role {role!r} here (there are {', '.join(known)}); add it with add_role"
            )
        if self.adapters.names:
            self.adapters.use(role if role in self.adapters.names else None)
        return self.model

    def checkpoint_activations(self, offload: bool = False) -> None:
        """Recompute activations in the backward pass instead of keeping them; ``offload`` what is kept to the host."""
        self.host_inputs = HostInputs() if offload else None
        for body in (self.model, *self.copies.values()):
            checkpoint_layers(body, self.host_inputs)

    # ---- fusion

    def _fuse(self) -> None:
        if self.fused:
            fuse(self.model)

    def unfuse(self) -> None:
        """From now on run PEFT's and transformers' own code only."""
        self.fused = False
        for body in (self.model, *self.copies.values()):
            unfuse(body)

    @property
    def fusion(self) -> Fusion:
        """Which modules run our LoRA, MLP and RMSNorm under the adapter that is active now, and why others do not."""
        return describe(self.model)

    # ---- passes

    def forward(self, batch: TokenBatch, output: str = "logprobs", **options) -> Any:
        """``logprobs`` unless ``output`` names another pass. One door, so that a DDP wrapper sees every pass."""
        passes = {
            "logprobs": self.logprobs,
            "values": self.values,
            "scores": self.scores,
            "head_scores": self.head_scores,
        }
        return passes[output](batch, **options)

    def hidden(self, batch: TokenBatch, role: str) -> Tensor:
        """Last hidden states of the packed batch, (N, D)."""
        body = self.model_for(role).get_decoder()
        with self._precision():
            out = body(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                attention_mask=None,
                use_cache=False,
                segments=Segments.of(batch, self.attention),
            )
        return self.adapters.guard(out.last_hidden_state[0])

    def logprobs(
        self,
        batch: TokenBatch,
        *,
        role: str | None = None,
        temperature: float = 1.0,
        entropy: bool | str = False,
        sharpened: bool = False,
        greedy_hits: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Log-probability of every response token given what precedes it.

        Args:
            batch: N packed tokens.
            role: whose probabilities; the policy's own by default.
            temperature: of the softmax.
            entropy: also return the entropy of each prediction; "detached" when no gradient through it is needed.
            sharpened: also return the log-probabilities at half the temperature, of the squared probabilities made to sum to 1,
                without a gradient. Costs one more product with the head.
            greedy_hits: also return, last, how many response tokens are the most likely ones, a device scalar. Costs one
                more product with the head, without a gradient.

        Returns:
            (N,) float32, 0 outside the responses; with ``entropy`` or ``sharpened``, a tuple of such.
        """
        role = role or self.role
        hidden, weight, options = self._head_inputs(batch, role)
        labels = batch.input_ids[batch.response_rows]
        with self._precision():
            flat = linear_logprobs(hidden, weight, labels, temperature=temperature, entropy=entropy, **options)
        results = [self._spread(x, batch) for x in (flat if entropy else (flat,))]
        if sharpened:
            with torch.no_grad(), self._precision():
                flat = linear_logprobs(hidden, weight, labels, temperature=temperature / 2, **options)
            results.append(self._spread(flat, batch))
        if greedy_hits:
            results.append(_greedy_hits(hidden, weight, labels, **options))
        return tuple(results) if len(results) > 1 else results[0]

    def values(self, batch: TokenBatch, *, role: str = "value") -> Tensor:
        """The critic's estimate of the state before every response token. (N,) float32, 0 outside the responses."""
        hidden = self.hidden(batch, role)
        return self._spread(self.heads[role](hidden[batch.predictor_rows]), batch)

    def scores(self, batch: TokenBatch, *, role: str = "reward") -> Tensor:
        """The reward model's score of every sequence, read at its last token; the mean of an ensemble's. (B,) float32."""
        return self.heads[role](self._last_hidden(batch, role))

    def head_scores(self, batch: TokenBatch, *, role: str = "reward") -> Tensor:
        """What each of the K heads of a reward model's ensemble says of every sequence. (B, K) float32."""
        return self.heads[role].each(self._last_hidden(batch, role))

    def _last_hidden(self, batch: TokenBatch, role: str) -> Tensor:
        return self.hidden(batch, role)[batch.cu_seqlens[1:].long() - 1]

    def _precision(self) -> contextlib.AbstractContextManager:
        """Compute in ``compute_dtype``: all passes alike, so that training sees the probabilities that were sampled."""
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def _head_inputs(self, batch: TokenBatch, role: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Hidden rows that predict a response token, the head's weight, and how logits follow from them."""
        hidden = self.hidden(batch, role)[batch.predictor_rows]
        model = self.model_for(role)
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        weight, bias = head.weight, getattr(head, "bias", None)
        # Cohere multiplies logits, Granite divides them, Gemma 2 caps them
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        with self._precision():
            low_rank = self.adapters.low_rank(head, hidden)
        return hidden, weight, {"bias": bias, "low_rank": low_rank, "softcap": softcap, "logit_scale": scale}

    @staticmethod
    def _spread(rows: Tensor, batch: TokenBatch) -> Tensor:
        """(R,) values of response tokens -> (N,), 0 elsewhere."""
        return rows.new_zeros(batch.input_ids.shape[0]).index_copy(0, batch.response_rows, rows)

    # ---- generation

    @contextlib.contextmanager
    def generation_model(
        self, role: str | None = None, attention: str | None = None, merge_lora: bool = False
    ) -> Iterator[PreTrainedModel]:
        """The model in ``role`` ready to write: eval mode, and the ``attention`` registered under that name, transformers'
        own when None; with ``merge_lora`` the role's adapter in the base weights, see ``Adapters.merged_in_place``. All is
        restored."""
        active = self.adapters.active
        model = self.model_for(role or self.role)
        try:
            merged = self.adapters.merged_in_place() if merge_lora else contextlib.nullcontext()
            attention = generation_attention(model, attention or self.native_attention)
            with in_eval_mode(model), attention, self._precision(), merged:
                yield model
        finally:
            self.adapters.use(active)

    def merge_refusal(self, role: str) -> str | None:
        """Why ``generation_model`` cannot merge the adapter of ``role``; None when it can."""
        return self.adapters.merge_refusal(role) if role in self.adapters.names else "it has no adapter"

    # ---- files

    def check_folder(self, folder: str | Path) -> None:
        """Raise UserError if ``folder`` holds a model of the other kind: loading could not tell which one is meant."""
        other = "config.json" if self.adapters.names else "adapter_config.json"
        if (Path(folder) / other).is_file():
            kind = "a whole model, and this run trains an adapter" if self.adapters.names else "an adapter"
            raise UserError(f"{folder} already holds {kind} ({other}); choose another output_dir")

    def save(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write adapter (PEFT format) or whole model, tokenizer and heads.

        Adapter and heads are then read back, and must give the outputs of those in memory on a few tokens, bit for bit.

        Args:
            weights: what is trained, by the names of the policy's parameters, where this process has a part of it only; what is
                read back is then compared with these, without a pass.

        Raises:
            OSError: what is on disk differs from what is in memory.
            UserError: the folder holds a model of the other kind.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.check_folder(folder)
        model, heads = (
            (None, self.heads.state_dict())
            if weights is None
            else (_under("model.", weights), _under("heads.", weights))
        )
        if self.adapters.names:
            self.adapters.save(self.role, folder, model)
        else:
            self.model.save_pretrained(folder, state_dict=model)
        self.tokenizer.save_pretrained(folder)
        heads = {k: v.detach().cpu() for k, v in heads.items() if k.startswith(f"{self.role}.")}
        if heads:
            save_file(heads, folder / HEADS_FILE)
        about = {"role": self.role} | ({"base": self.base} if self.adapters.names else {})
        (folder / ROLE_FILE).write_text(json.dumps(about, indent=2) + "\n")
        if weights is None:
            self._check_saved(folder, bool(heads))
        else:
            _check_files(folder, heads, model if self.adapters.names else {}, self.role)

    @torch.no_grad()
    def _check_saved(self, folder: Path, head: bool) -> None:
        """Read adapter and head back beside those in memory, on the same base, and compare."""
        wrong = []
        # PEFT initialises an adapter before it loads one; the run's random numbers stay as they were
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.adapters.aside(), in_eval_mode(self):
            try:
                if head:
                    load_heads(self, folder, READ_BACK)
                    saved, mine = self.heads[READ_BACK].state_dict(), self.heads[self.role].state_dict()
                    wrong += [HEADS_FILE] if any(not torch.equal(saved[k], v) for k, v in mine.items()) else []
                if self.adapters.names:
                    self.adapters.load(READ_BACK, folder, trainable=False)
                    saved, mine = self.adapters.parameters(READ_BACK), self.adapters.parameters(self.role)
                    same = all(torch.equal(saved[k], v) for k, v in mine.items())
                    # a wrong head alone would make the outputs differ
                    same = same and (bool(wrong) or self._same_outputs(head))
                    wrong += [] if same else ["adapter_model.safetensors"]
            finally:
                if READ_BACK in self.heads:
                    del self.heads[READ_BACK]
                if READ_BACK in self.adapters.names:
                    self.adapters.remove(READ_BACK)
        if wrong:
            raise OSError(f"{folder}: {' and '.join(wrong)} read back other than what is in memory; check the disk")

    def _same_outputs(self, head: bool) -> bool:
        """Whether the adapter just read back says the same as ours about two short sequences."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        rows = [[(3 + 7 * i) % vocabulary for i in range(n)] for n in (5, 3)]
        batch = TokenBatch.pack([Example(ids, [False] + [True] * (len(ids) - 1)) for ids in rows], self.device)
        run = self.scores if head else self.logprobs
        mine = run(batch, role=self.role)
        # a pass that does not even repeat itself can accuse nobody
        return torch.equal(run(batch, role=READ_BACK), mine) or not torch.equal(run(batch, role=self.role), mine)

    def export(self, folder: str | Path) -> None:
        """Write a plain transformers folder, adapters folded into the weights.

        Raises:
            UserError: this is a reward model, whose head a causal LM folder cannot hold.
        """
        if self.role != "policy":
            raise UserError(
                f"only a policy exports to a causal LM folder; this is a {self.role} model with a scalar head"
            )
        model = self.adapters.merged(self.role) if self.adapters.names else self.model
        # no trace of our attention's name in the written config
        with generation_attention(model, self.native_attention):
            model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _check_files(folder: Path, heads: dict[str, Tensor], adapters: dict[str, Tensor], role: str) -> None:
    """Compare what is on the disk with the head and the adapter of ``role`` that were written."""
    mine = {f"base_model.model.{k}".replace(f".{role}.", "."): v for k, v in adapters.items() if f".{role}." in k}
    for name, written in ((HEADS_FILE, heads), ("adapter_model.safetensors", mine)):
        saved = load_file(folder / name) if written else {}
        if saved.keys() != written.keys() or any(not torch.equal(saved[k], v) for k, v in written.items()):
            raise OSError(f"{folder}: {name} read back other than what was written; check the disk")


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """``module`` without dropout; every part of it is in its own mode again afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def _greedy_hits(hidden, weight, labels, *, bias, low_rank, chunk_size: int = 256, **monotonic) -> Tensor:
    """How many labels are the most likely words; logits as large as ``linear_logprobs`` holds them at most. A softcap and a
    scale change no order."""
    hits = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = hidden[rows] @ weight.T.to(hidden.dtype)
        if low_rank is not None:
            x, b = (t.to(hidden.dtype) for t in low_rank)
            logits += x[rows] @ b.T
        if bias is not None:
            logits = logits + bias
        hits += (logits.argmax(-1) == labels[rows]).sum()
    return hits


def load_heads(policy: Policy, folder: Path, role: str) -> None:
    """Put the scalar head saved in ``folder`` in place as ``role``'s."""
    saved = {key.split(".", 1)[1]: value for key, value in load_file(folder / HEADS_FILE).items()}
    policy.add_head(role, count=saved["bias"].numel())
    policy.heads[role].load_state_dict(
        {**saved, "bias": saved["bias"].reshape(-1)}
    )  # of one head it was a bare number once


def stop_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """The ids that end a response: the generation config's, else the tokenizer's."""
    ids = None if generation_config is None else generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def saved_role(folder: Path) -> str:
    """What the model in ``folder`` was trained for: "policy", unless our own file says otherwise."""
    return _about(folder).get("role", "policy")


def saved_base(folder: Path) -> dict[str, str] | None:
    """The fingerprint of the base that the adapter in ``folder`` was trained on, when our own file holds it."""
    return _about(folder).get("base")


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ROLE_FILE
    return json.loads(path.read_text()) if path.is_file() else {}
