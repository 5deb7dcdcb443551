"""What grows with the length: four buffers, 2 kappa a token, on the device or in host memory. Offloading is exact."""

import pytest
import torch
from chunkwise_cases import assert_same, chunked, far, plain, rounding, rounding_of_attention
from models import SHORT, build, tokens
from schedules import documents, pack, pad
from torch import nn

import lcpatch
from lcpatch.training import buffers, chunkwise, offload, pieces, spaco
from lcpatch_kernels import DENSE, BlockSparseSpec, block_sparse, block_sparse_backward

DEEP = {"num_hidden_layers": 8, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16, "head_dim": 32}
KAPPA = 8 * 2 * 2 * 32 * 4
"""Bytes of a token's keys and values in a model of `DEEP`, in fp32: layers, K and V, KV heads, head dim, bytes."""


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    return build("mistral", **DEEP).train()


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every store that a call makes, with what it held when it was closed."""
    seen = []
    for kind in (buffers.DeviceStore, offload.HostStore):
        close = kind.close

        def note(self, close=close):
            if self.memory()["device"]:
                seen.append(self.memory())
            close(self)

        monkeypatch.setattr(kind, "close", note)
    return seen


def test_buffers_hold_two_kappa_a_token(deep: nn.Module, stores: list):
    for length in (97, 161):
        chunked(deep, tokens(1, length), tokens(1, length), 32)
    short, long = stores
    assert long["device"] - short["device"] == 2 * KAPPA * 64


def peak(run) -> int:
    """The most bytes of tensors alive at one time during `run()`, above those before it."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def slope(run) -> float:
    """Growth of the peak of `run(length)` with the length, in kappa a token."""
    few, many = (peak(lambda length=length: run(length)) for length in (129, 193))
    return (many - few) / (64 * KAPPA)


def attention_alone(length: int):
    """What one layer's attention allocates for the last chunk, forward and backward."""
    q, k, v = torch.randn(1, 4, 32, 32), *torch.randn(2, 1, 2, length, 32)
    spec = BlockSparseSpec.of([DENSE] * 4)
    out, lse = block_sparse(q, k, v, spec)
    block_sparse_backward(out, lse, q, k, v, out, lse, spec)


def test_nothing_else_grows(deep: nn.Module):
    """The peak grows by the buffers and by what one layer's attention takes at a time."""

    def run(length: int, **settings):
        chunked(deep, tokens(1, length), tokens(1, length), 32, **settings)

    allowed = 2 + slope(attention_alone)
    assert allowed < 3  # what the published code takes
    assert 2 <= slope(lambda length: run(length, attention="lcpatch")) <= allowed
    assert slope(lambda length: run(length, attention="own")) > 3  # masked SDPA keeps repeated heads


def test_offloaded_the_device_holds_two_slots(deep: nn.Module, stores: list, monkeypatch: pytest.MonkeyPatch):
    pool = offload.HostPool(slab_bytes=1 << 12)
    monkeypatch.setattr(chunkwise, "POOL", pool)
    for length in (97, 161):
        chunked(deep, tokens(1, length), tokens(1, length), 32, offload=True)
    short, long = stores
    units = 8 * 2  # two KV heads a layer, one a unit
    assert long["device"] - short["device"] == 2 * KAPPA * 64 // units
    # Of 160 tokens' pages, all of the keys and values, and gradients of all but the last chunk, whose none asks for.
    assert long["host"] == KAPPA * (160 + 128)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_offloading_is_exact(family: str, checkpoint: bool):
    """Also for layers with windows, which stay on the device beside it, and with layers run again."""
    model, ids = build(family).double().train(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding_of_attention(model, ids, ids)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for size in (74, 32, 7):
        assert_same(chunked(model, ids, ids, size, offload=True), want, allowed)
    cut = chunked(model, ids, ids, 16, offload=True, estimator=lambda count: spaco.seco(count, hop=0.0))
    assert far(cut[1], want[1]) > 1000 * allowed


@pytest.mark.parametrize("offloaded", [False, True])
def test_attention_in_pieces(offloaded: bool):
    """What cuDNN does on a GPU, with its calls in plain torch: ten chunks of prefix, in pieces of 8, 4, 2, 1."""
    model, ids = build("mistral", num_attention_heads=8, num_key_value_heads=4).double().train(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding_of_attention(model, ids, ids)
    for size in (74, 32, 7):
        assert_same(chunked(model, ids, ids, size, attention="cudnn", offload=offloaded), want, allowed)


def test_pieces():
    assert list(pieces.pieces(0, 7)) == []
    assert list(pieces.pieces(7 * 11, 7)) == [slice(0, 56), slice(56, 70), slice(70, 77)]
    assert [p.stop - p.start for p in pieces.pieces(7 * 21, 7)] == [56, 56, 28, 7]  # none grows with the text


@pytest.mark.parametrize("method", ["s2", "sf"])
def test_offloading_a_patched_model(method: str):
    """Rules differ by head, and heads are taken apart; padded and packed rows."""
    model = build("mistral", num_attention_heads=8, num_key_value_heads=4).double().train()
    lcpatch.apply(model, method, **SHORT[method])
    (padded, mask), (packed, positions) = pad(documents(), "left"), pack(documents())
    for ids, inputs in ((padded, {"attention_mask": mask}), (packed, {"position_ids": positions})):
        labels = ids.masked_fill(mask == 0, -100) if "attention_mask" in inputs else ids
        want, allowed = plain(model, ids, labels, **inputs), rounding(model)
        assert_same(chunked(model, ids, labels, 16, offload=True, **inputs), want, allowed)


def test_spaco_offloaded(deep: nn.Module):
    """Chunks that are left out leave their gradients behind."""
    ids, plan = tokens(2), spaco.bernoulli((True, False, True, False, True), 0.5)
    settings = {"attention": "lcpatch", "estimator": lambda count: plan}
    want = chunked(deep, ids, ids, 16, **settings)
    assert_same(chunked(deep, ids, ids, 16, offload=True, **settings), want, rounding(deep))


def test_units_arrive_ahead(deep: nn.Module, monkeypatch: pytest.MonkeyPatch):
    """Once a pass has seen one chunk, no unit is waited for: each is on its way while the one before computes."""
    late = []
    read, load = offload.HostStore.read, offload.HostStore._load

    def note(self, unit, now):
        held = any(slot.unit == unit and slot.end >= now.end for slot in self._slots)
        late.append((now.new, now.backward, now.start, held))
        return read(self, unit, now)

    monkeypatch.setattr(offload.HostStore, "read", note)
    chunked(deep, tokens(1, 129), tokens(1, 129), 32, offload=True)
    assert load is offload.HostStore._load
    after_one = [held for new, _, start, held in late if not new and start < 96]
    assert len(after_one) == 3 * 2 * 16  # three chunks, forward and backward, 16 units
    assert sum(after_one) >= len(after_one) - 3  # but for the first unit of a chunk
    monkeypatch.setattr(offload.HostStore, "_predict", lambda self, unit, now: None)
    late.clear()
    chunked(deep, tokens(1, 129), tokens(1, 129), 32, offload=True)
    assert sum(held for new, _, start, held in late if not new and start < 96) < 15


def test_pool():
    pool = offload.HostPool(slab_bytes=1 << 12)
    parts = [pool.take((3, 50), torch.float32) for _ in range(20)]
    big = pool.take((5000,), torch.bfloat16)
    for n, part in enumerate(parts):
        part.fill_(n)
    big.fill_(-1)
    assert all((part == n).all() for n, part in enumerate(parts))  # none overlaps another
    assert all(len(slab) & (len(slab) - 1) == 0 for slab in pool._slabs)
    held = pool.memory()
    pool.rewind()
    again = [pool.take((3, 50), torch.float32) for _ in range(20)]
    assert pool.memory() == held
    assert [x.data_ptr() for x in again] == [x.data_ptr() for x in parts]
    pool.reserve(held + 1)
    assert pool.memory() == held + (1 << 12)
    pool.release()
    assert pool.memory() == 0


def test_calls_reuse_host_memory(deep: nn.Module, monkeypatch: pytest.MonkeyPatch):
    pool = offload.HostPool(slab_bytes=1 << 14)
    monkeypatch.setattr(chunkwise, "POOL", pool)
    held = []
    for _ in range(3):
        chunked(deep, tokens(), tokens(), 16, offload=True)
        held.append(pool.memory())
    assert held[0] == held[1] == held[2] > 0


def test_refusals():
    model, ids = build().train(), tokens()
    with pytest.raises(ValueError, match="needs attention='lcpatch'"):
        chunked(model, ids, ids, 16, offload=True, attention="own")
    with pytest.raises(ValueError, match="attention dropout"):
        chunked(build(attention_dropout=0.1).train(), ids, ids, 16, offload=True)


@pytest.mark.parametrize("offloaded", [False, True])
def test_rehearsal(deep: nn.Module, stores: list, monkeypatch: pytest.MonkeyPatch, offloaded: bool):
    """What it allocates is what the step allocates; gradients stay as they were, and no host memory is tried."""
    pool = offload.HostPool(slab_bytes=1 << 12)
    monkeypatch.setattr(chunkwise, "POOL", pool)
    runs = []
    decode = chunkwise._Run._decode
    monkeypatch.setattr(chunkwise._Run, "_decode", lambda run, m, *at: runs.append(at) or decode(run, m, *at))
    before = {name: torch.randn_like(p) for name, p in deep.named_parameters()}
    for name, p in deep.named_parameters():
        p.grad = before[name]
    chunkwise.rehearse(deep, length=160, chunk_size=32, offload=offloaded)
    assert runs == [(0, 32), (96, 128), (128, 160), (96, 128)]
    assert all(p.grad is before[name] for name, p in deep.named_parameters())
    host = pool.memory()
    chunked(deep, tokens(1, 161), tokens(1, 161), 32, offload=offloaded)
    rehearsed, real = stores
    assert rehearsed["device"] == real["device"]
    assert host == (KAPPA * (32 * 3 + 32) if offloaded else 0)  # three chunks, and what the last leaves the one before
    assert pool.memory() == (KAPPA * (160 + 128) if offloaded else 0)
    chunkwise.rehearse(deep, length=20, chunk_size=32, offload=offloaded)  # one chunk


def test_first_pass(deep: nn.Module, monkeypatch: pytest.MonkeyPatch):
    """What `backward` runs before its second pass, and no more."""
    runs = []
    decode = chunkwise._Run._decode
    monkeypatch.setattr(chunkwise._Run, "_decode", lambda run, m, *at: runs.append(at) or decode(run, m, *at))
    deep.zero_grad()
    chunkwise.first_pass(deep, length=90, chunk_size=32)
    alone = list(runs)
    assert alone == [(0, 32), (32, 64)]
    assert not any(p.grad is not None for p in deep.parameters())
    runs.clear()
    chunked(deep, tokens(1, 91), tokens(1, 91), 32)
    assert runs == [*alone, (64, 90), (32, 64), (0, 32)]
