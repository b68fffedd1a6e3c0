"""What a CUDA graph would compute: more slots and keys than are live. Capturing itself needs a GPU."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import Request, Session, SlotEngine
from rlhf_fast.rollout.graphs import DecodeGraphs, rounded_keys, rounded_slots
from rlhf_fast.rollout.slot_cache import SlotCache

PROMPTS = [[5], [7, 9, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 13], [20, 0, 21, 0, 22]]


class Uncaptured(DecodeGraphs):
    """Runs what would be captured, at the rounded shapes."""

    captured: ClassVar[list[tuple[int, int]]] = []

    def capture(self, slots, keys):
        self.captured.append((slots, keys))
        return lambda: self.run(slots, keys)


def write(policy, requests, graphs=None):
    """Tokens of every sample by key and index."""
    found = {}
    with SlotEngine(policy, slots=11).session() as session:
        for request in requests:
            session.add(request)
        if graphs is not None:
            session.graphs = graphs(session.model, session.cache, session.integers)
            session._decode = lambda: _by_graph(session)
        while not session.idle:
            for w in session.step():
                found[w.key, w.index] = w.sample.ids
        return found


def _by_graph(session):
    length = max(w.position for w in session.live) + 1
    session._make_room(length)
    return session.graphs(len(session.live), length)


@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_slots_and_keys_that_are_not_live_change_nothing(make_policy, architecture):
    """Samples come and go, the cache grows, and slots that were left hold positions of their last sample."""
    policy = make_policy(architecture)
    requests = [Request(p, n=4, max_new_tokens=5 + 9 * i, seed=i) for i, p in enumerate(PROMPTS)]
    Uncaptured.captured.clear()
    assert write(policy, requests, Uncaptured) == write(policy, requests)
    # 11 is all there are; the cache grew, and with it the graphs were dropped
    assert {slots for slots, _ in Uncaptured.captured} >= {2, 8, 11}
    assert len({keys for _, keys in Uncaptured.captured}) > 1


def test_graphs_are_dropped_when_the_cache_has_moved_even_if_it_is_back_at_its_old_shape():
    cache, k = SlotCache(), torch.zeros(1, 2, 3, 4)
    graphs = Uncaptured(None, cache, torch.zeros(8, 3, dtype=torch.long))
    graphs.run = lambda slots, keys: torch.zeros(slots, 5)
    cache.resize(8, 200)
    cache.layer(0, k, k)
    Uncaptured.captured.clear()
    for _ in range(2):
        graphs(8, 200)
    assert Uncaptured.captured == [(8, 200)]
    cache.resize(16, 100)  # no token is decoded at this shape
    cache.resize(8, 200)
    graphs(8, 200)
    assert Uncaptured.captured == [(8, 200)] * 2


@pytest.fixture
def decoding_by_graph(monkeypatch):
    """decoding_by_graph(graphs) -> every engine decodes through graphs of that class from now on."""

    def use(graphs):
        monkeypatch.setattr("rlhf_fast.rollout.graphs.DecodeGraphs", graphs)
        monkeypatch.setattr(Session, "_decode", _by_graph)
        Uncaptured.captured.clear()

    return use


EVEN = [Request(p, n=2, max_new_tokens=8, seed=3) for p in PROMPTS]
RAGGED = [Request(p, n=2, max_new_tokens=3 + 3 * i, seed=3) for i, p in enumerate(PROMPTS)]


def tokens(engine, requests=EVEN):
    return [[s.ids for s in group] for group in engine.generate(requests)]


def captures_of(engine):
    """How many graphs another session captures."""
    before = len(Uncaptured.captured)
    tokens(engine)
    return len(Uncaptured.captured) - before


def test_graphs_are_captured_once_for_all_sessions_until_something_has_moved(make_policy, decoding_by_graph):
    """An update of the weights in place moves nothing; a weight, the cache or an adapter at another address does."""
    policy = make_policy(peft_config=lora_config(r=2))
    decoding_by_graph(Uncaptured)
    engine = SlotEngine(policy, slots=11)
    assert captures_of(engine) > 0 == captures_of(engine)
    with torch.no_grad():
        for parameter in policy.adapters.parameters("policy").values():
            parameter.add_(0.1)
    engine.update(None, 1)
    assert captures_of(engine) == 0
    assert tokens(engine) == tokens(SlotEngine(policy, slots=11))
    head = policy.model.lm_head.weight
    head.data = head.data.clone()
    assert captures_of(engine) > 0 == captures_of(engine)
    engine.sleep()
    assert captures_of(engine) > 0 == captures_of(engine)
    engine.role = "reference"  # without the adapter: other kernels
    assert captures_of(engine) > 0 == captures_of(engine)
    engine.role = "policy"
    assert captures_of(engine) == 0
    engine.merge_lora = True  # each session's product has a place of its own
    assert captures_of(engine) > 0


def test_graphs_over_weights_that_autocast_has_cast_end_with_their_session(make_policy, decoding_by_graph):
    policy = make_policy()
    policy.compute_dtype = torch.bfloat16
    decoding_by_graph(Uncaptured)
    engine = SlotEngine(policy, slots=11)
    assert captures_of(engine) > 0 and captures_of(engine) > 0


def test_graphs_of_few_roles_are_kept(make_policy, decoding_by_graph):
    policy = make_policy(peft_config=lora_config(r=2))
    for i in range(5):
        policy.adapters.add(f"role{i}", lora_config(r=2))
    policy.adapters.use("policy")
    decoding_by_graph(Uncaptured)
    engine = SlotEngine(policy, slots=11)
    for i in range(5):
        engine.role = f"role{i}"
        tokens(engine)
    assert [role for role, _ in engine.graphs.kept] == [f"role{i}" for i in range(1, 5)]


class Broken(DecodeGraphs):
    """Cannot capture; where ``one`` is set, not more than one graph."""

    error: ClassVar[Exception]
    one: ClassVar[bool] = False

    def capture(self, slots, keys):
        if self.one and not self.graphs:
            return lambda: self.run(slots, keys)
        raise self.error


def test_a_model_that_cannot_be_captured_runs_step_by_step_and_a_line_says_so(policy, decoding_by_graph, caplog):
    want = tokens(SlotEngine(policy, slots=11))
    Broken.error = RuntimeError("operation not permitted when stream is capturing")
    decoding_by_graph(Broken)
    engine = SlotEngine(policy, slots=11)
    assert tokens(engine) == want == tokens(engine)
    assert caplog.text.count("without CUDA graphs: operation not permitted") == 1


def test_graphs_give_their_memory_back_where_it_runs_out_and_are_tried_again_in_the_next_session(
    policy, decoding_by_graph, caplog, monkeypatch
):
    want = tokens(SlotEngine(policy, slots=11), RAGGED)
    monkeypatch.setattr(Broken, "one", True)
    Broken.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    decoding_by_graph(Broken)
    engine = SlotEngine(policy, slots=11)
    assert tokens(engine, RAGGED) == want
    ((_, graphs),) = engine.graphs.kept.values()
    assert not graphs.graphs and graphs.logits is None
    assert tokens(engine, RAGGED) == want
    assert caplog.text.count("without CUDA graphs: not enough memory for graphs (CUDA out of memory") == 2


def test_a_pass_that_runs_out_of_memory_without_a_graph_says_so(policy, decoding_by_graph, monkeypatch):
    Broken.error = torch.OutOfMemoryError("CUDA out of memory.")
    decoding_by_graph(Broken)

    def full(graphs, *_):
        raise Broken.error

    engine = SlotEngine(policy, slots=11)
    monkeypatch.setattr(Broken, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(EVEN)
    assert not engine._open


def test_shapes_are_rounded_up_to_few():
    counts = range(1, 257)
    assert all(rounded_slots(n) >= n for n in counts) and len({rounded_slots(n) for n in counts}) == 17
    assert [rounded_keys(n) for n in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_write_what_ordinary_passes_write(make_policy):
    policy = make_policy().to("cuda")
    requests = [Request(p, n=4, max_new_tokens=5 + 9 * i, seed=i) for i, p in enumerate(PROMPTS)]
    engine = SlotEngine(policy, slots=11)
    captured = [[s.ids for s in g] for g in engine.generate(requests)]
    with engine.session() as session:
        session.graphs.refusal = "for comparison"
        for request in requests:
            session.add(request)
        found = {}
        while not session.idle:
            for w in session.step():
                found.setdefault(w.key, {})[w.index] = w.sample.ids
    assert captured == [[found[i][j] for j in range(4)] for i in range(len(PROMPTS))]
