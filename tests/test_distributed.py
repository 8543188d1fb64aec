# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: what ranks compute together against the reference of the whole sequence, and what they send."""

import contextlib
import datetime
import functools
import itertools
import math
import pickle
import zlib

import numpy as np
import pytest
from fresh import TIMEOUT, run_file

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Routing,
    Tree,
    Window,
    reference,
)

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

import combiner.torch  # noqa: E402
from combiner import distributed  # noqa: E402

WORLDS = (2, 4, 5)  # groups of ranks; in the largest, a shard is in two blocks of shards, and some blocks are cut short
# How far results may lie from the exact ones, in their largest. Summaries, parts and their sums are each rounded.
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
HEADS = (((2,), 2, 2), ((), 4, 2), ((1,), 3, 1))  # leading axes, Hq, Hk
D, Dv = 8, 5
CASES = {  # pattern and positions of a rank
    "fixed": (Fixed(4), 16),
    "fixed, a span to a rank": (Fixed(16), 16),
    "fixed, mean, biased": (Fixed(5, pooling="mean", size_bias=True), 15),
    "tree of one level": (Tree(4, 1, pooling="sum"), 8),
    "tree, a rank's nodes": (Tree(2, 2), 12),
    "tree, a node to a rank": (Tree(3, 2, size_bias=True), 9),
    "tree": (Tree(4, pooling="mean", size_bias=True), 16),
    "tree, a position to a rank": (Tree(2), 1),
    "tree of ranks' levels": (Tree(2, 5), 16),
    "hierarchical": (LogSparse(hierarchical=True), 16),
    "hierarchical, biased": (LogSparse(hierarchical=True, pooling="mean", size_bias=True), 8),
    "logsparse": (LogSparse(), 16),
    "logsparse, mean, biased": (LogSparse(pooling="mean", size_bias=True), 8),
    "logsparse, a position to a rank": (LogSparse(), 1),
    "logsparse, long": (LogSparse(), 128),
    "rowmajor": (Axial(4, "rowmajor"), 16),
    "rowmajor, a row to a rank": (Axial(16, "rowmajor", size_bias=True), 16),
    "rowmajor, long rows": (Axial(80, "rowmajor"), 160),
    "rowmajor, weighted": (Axial(5, "rowmajor", "weighted"), 15),
}


def heads(name):
    return HEADS[list(CASES).index(name) % len(HEADS)]


def dtypes(world, is_causal):
    return list(WITHIN) if world == 4 and is_causal else [torch.float64, torch.float32]


def draw(name, world, dtype=torch.float64):
    """q, k, v and the gradient of out, whole: numbers of both the dtype and float32."""
    _, n = CASES[name]
    lead, Hq, Hk = heads(name)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shapes = ((*lead, H, n * world, features) for H, features in ((Hq, D), (Hk, D), (Hk, Dv), (Hq, Dv)))
    return [torch.from_numpy(rng.standard_normal(shape)).float().to(dtype) for shape in shapes]


# ---- in the ranks' processes


def shard(x, rank, n):
    return x[..., rank * n : (rank + 1) * n, :].clone()


@contextlib.contextmanager
def counted():
    """The bytes that this process hands to others in the two collectives that are used: [bytes]."""
    sent = [0]
    all_gather, all_to_all_single = dist.all_gather, dist.all_to_all_single

    def count_gather(received, mine, *arguments, **options):
        sent[0] += mine.nbytes * (len(received) - 1)
        return all_gather(received, mine, *arguments, **options)

    def count_all_to_all(received, mine, *arguments, **options):
        sent[0] += mine.nbytes - mine[0].nbytes
        return all_to_all_single(received, mine, *arguments, **options)

    dist.all_gather, dist.all_to_all_single = count_gather, count_all_to_all
    try:
        yield sent
    finally:
        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all_single


def run(rank, folder):
    """One process: its part of every case of every world that it is in, and what one process cannot test."""
    torch.set_num_threads(1)
    combiner.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLDS[-1])
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLDS[-1], timeout=timeout)
    found = {}
    for world in WORLDS:
        group = dist.new_group(range(world)) if world < WORLDS[-1] else None
        if rank < world:
            for name, is_causal in itertools.product(CASES, (True, False)):
                for dtype in dtypes(world, is_causal):
                    found[world, name, is_causal, dtype] = run_case(rank, world, group, name, is_causal, dtype)
        else:
            found["outside"] = is_refused(group)
    found |= {test.__name__: test(rank) for test in TOGETHER}
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(found, file)
    dist.destroy_process_group()


def run_case(rank, world, group, name, is_causal, dtype):
    """out and the gradients of this rank's positions, and the bytes sent forward and backward."""
    pattern, n = CASES[name]
    *inputs, grad_out = (shard(x, rank, n) for x in draw(name, world, dtype))
    inputs = [x.requires_grad_() for x in inputs]
    with counted() as forward:
        out = distributed.attention(*inputs, pattern, is_causal=is_causal, scale=0.3, group=group)
    with counted() as backward:
        out.backward(grad_out)
    return [out.detach(), *(x.grad for x in inputs)], (*forward, *backward)


def given(rank):
    pattern, n = CASES["fixed"]
    *inputs, _ = (shard(x, rank, n) for x in draw("fixed", WORLDS[-1]))
    return pattern, [x.requires_grad_() for x in inputs]


def is_refused(group):
    """A rank that is not of the group has no part in it."""
    pattern, inputs = given(0)
    with pytest.raises(ValueError, match="group must hold the rank"):
        distributed.attention(*inputs, pattern, group=group)
    return True


def views(rank):
    """Inputs `[L, H, D]`, transposed; a gradient of out without memory of its own."""
    pattern, inputs = given(rank)
    own = [x.detach().transpose(-2, -3).contiguous().requires_grad_() for x in inputs]
    for x in inputs, [x.transpose(-2, -3) for x in own]:
        distributed.attention(*x, pattern).sum().backward()
    return all(torch.equal(x.grad, y.grad.transpose(-2, -3)) for x, y in zip(inputs, own, strict=True))


def again(rank):
    """A second backward gives what the first gave."""
    pattern, inputs = given(rank)
    out = distributed.attention(*inputs, pattern).sum()
    first, second = (torch.autograd.grad(out, inputs, retain_graph=True) for _ in range(2))
    return all(map(torch.equal, first, second))


def written(rank):
    """What was written between forward and backward is an error in backward."""
    pattern, inputs = given(rank)
    out = distributed.attention(*inputs, pattern)
    with torch.no_grad():
        inputs[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    return True


def twice(rank):
    """A gradient's gradient is an error."""
    pattern, inputs = given(rank)
    out = distributed.attention(*inputs, pattern)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    return True


def replicas(rank):
    """A PyTorch layer with our attention under DistributedDataParallel: gradients are the ranks' mean."""

    def build():
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=torch.float64)
        layer.self_attn = combiner.torch.CombinerAttention.from_mha(layer.self_attn, Fixed(4), is_causal=True)
        return layer

    def loss(layer, rank):
        length = 8 + 2 * (rank % 2)
        x = torch.randn(length, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        return layer(x).square().sum()

    replica, alone = torch.nn.parallel.DistributedDataParallel(build()), build()
    loss(replica, rank).backward()
    (sum(loss(alone, each) for each in range(WORLDS[-1])) / WORLDS[-1]).backward()
    pairs = zip(replica.module.parameters(), alone.parameters(), strict=True)
    return all(torch.allclose(x.grad, y.grad, rtol=1e-10, atol=1e-12) for x, y in pairs)


def terms(rank):
    """Softcap, biases and sinks against the reference of the whole, as far as this rank has it; and what is sent."""
    for number, (name, given) in enumerate(itertools.product(CASES, ("key_bias", "region_bias", "both"))):
        is_causal = number % 2 == 0
        pattern, n = CASES[name]
        whole = draw(name, WORLDS[-1])
        rng = np.random.default_rng(n)
        lead, Hq, Hk = heads(name)
        L = n * WORLDS[-1]
        shapes = {
            "key_bias": (*lead, Hq if is_causal else Hk, L),
            "region_bias": (*lead, Hk if is_causal else Hq, pattern.plan(L, is_causal).region_count),
            "sink": (Hq,),
        }
        if given != "both":
            del shapes["region_bias" if given == "key_bias" else "key_bias"]
        every = {term: rng.standard_normal(shape) for term, shape in shapes.items()}
        *inputs, grad_out = (shard(x, rank, n) for x in whole)
        here = slice(rank * n, (rank + 1) * n)
        own = {term: torch.from_numpy(x[..., here].copy() if term == "key_bias" else x) for term, x in every.items()}
        for x in (*inputs, *own.values()):
            x.requires_grad_()
        options = {"is_causal": is_causal, "softcap": 2.0}
        with counted() as forward:
            out = distributed.attention(*inputs, pattern, **own, **options)
        with counted() as backward:
            out.backward(grad_out)
        *arrays, grad = (x.numpy() for x in whole)
        expected, saved = reference.attention_forward(*arrays, pattern, **every, **options)
        exact = reference.attention_backward(grad, saved)
        pairs = [(out.detach(), expected), *zip((x.grad for x in inputs), exact[:3], strict=True)]
        pairs = [(x, y[..., here, :]) for x, y in pairs]
        for term, x in own.items():
            if term == "key_bias":
                pairs.append((x.grad, exact.key_bias[..., here]))
                continue
            dist.all_reduce(x.grad)  # of region_bias and sink a rank has a part
            pairs.append((x.grad, getattr(exact, term)))
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10, err_msg=f"{name}, {given}, causal {is_causal}")
        is_pooled = given == "key_bias" or (n == 1 and given == "both")
        bias_heads = shapes["key_bias" if is_pooled else "region_bias"][-2]
        bias_heads = Hq if getattr(pattern, "row_key", "") == "weighted" and is_pooled else bias_heads
        sizes = {"heads": Hq, "key_heads": Hk, "dim": D, "value_dim": Dv, "batch": math.prod(lead), "itemsize": 8}
        told = distributed.traffic(pattern, L, WORLDS[-1], **sizes, bias_heads=bias_heads)
        assert (*forward, *backward) == told, (name, given)
    return True


TOGETHER = (views, again, written, twice, replicas, terms)


# ---- in this one


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=WORLDS[-1])
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(WORLDS[-1])]


@pytest.mark.parametrize("is_causal", (True, False), ids=("causal", "bidirectional"))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks(found, world, name, is_causal):
    pattern, _ = CASES[name]
    for dtype in dtypes(world, is_causal):
        *inputs, grad_out = (x.double().numpy() for x in draw(name, world, dtype))
        out, saved = reference.attention_forward(*inputs, pattern, is_causal=is_causal, scale=0.3)
        exact = out, *reference.attention_backward(grad_out, saved)[:3]
        each = [rank[world, name, is_causal, dtype][0] for rank in found[:world]]
        for whole, *parts in zip(exact, *each, strict=True):
            assert all(x.dtype == dtype for x in parts)
            within = WITHIN[dtype] * max(1, np.abs(whole).max())
            np.testing.assert_allclose(torch.cat(parts, dim=-2).double(), whole, rtol=0, atol=within)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_traffic(found, world, name):
    pattern, n = CASES[name]
    lead, Hq, Hk = heads(name)
    sizes = {"heads": Hq, "key_heads": Hk, "dim": D, "value_dim": Dv, "batch": math.prod(lead)}
    for is_causal in (True, False):
        for dtype in dtypes(world, is_causal):
            expected = distributed.traffic(pattern, n * world, world, **sizes, itemsize=dtype.itemsize)
            for rank in found[:world]:
                assert rank[world, name, is_causal, dtype][1] == expected


@pytest.mark.parametrize("test", TOGETHER, ids=lambda test: test.__name__)
def test_together(found, test):
    assert all(rank[test.__name__] for rank in found)


def test_outside_the_group(found):
    assert all(rank["outside"] for rank in found[WORLDS[0] :])


def test_ring_traffic():
    """By hand: 65,536 positions, 8 heads of 64, on 4 ranks: 64 MiB of keys and values a rank, 3 passes of them."""
    sizes = {"heads": 8, "dim": 64}
    assert distributed.ring_traffic(65536, 4, **sizes) == (3 << 26, 3 << 27)
    assert distributed.ring_traffic(65536, 4, heads=8, key_heads=2, dim=64, value_dim=32, batch=2) == (9 << 23, 9 << 24)
    assert distributed.traffic(Fixed(256), 65536, 4, **sizes) == (3 << 18, 3 << 18)  # 256 positions a summary
    assert distributed.traffic(Axial(256, "rowmajor"), 65536, 4, **sizes) == (3 << 26, 3 << 26)  # as many as keys
    assert distributed.traffic(LogSparse(), 65536, 2, **sizes) == (1 << 12, 1 << 12)  # one summary


@pytest.mark.parametrize(
    ("pattern", "n", "error", "says"),
    (
        (Fixed(), 16, ValueError, "have its span or width given"),
        (Fixed(5), 16, ValueError, "divides the positions of a rank, 16"),
        (Fixed(32), 16, ValueError, "divides the positions of a rank, 16"),
        (Fixed(4), 0, ValueError, "divides the positions of a rank, 0"),
        (Fixed(4).sparse(), 16, ValueError, "one of Fixed, LogSparse, Tree and Axial"),
        (Axial(order="rowmajor"), 16, ValueError, "have its span or width given"),
        (Axial(3, "rowmajor"), 16, ValueError, "divides the positions of a rank, 16"),
        (Axial(4), 16, ValueError, "be row-major"),
        (Axial(4, "horizontal"), 16, ValueError, "be row-major"),
        (AxialMixture(4), 16, ValueError, "be row-major"),
        (LogSparse(), 12, ValueError, "a power of two of positions for each rank, not 12"),
        (LogSparse(hierarchical=True), 0, ValueError, "a power of two of positions for each rank, not 0"),
        (
            Tree(3),
            18,
            ValueError,
            "a power of its branching, or a multiple of its largest nodes, for each rank, not 18",
        ),
        (Tree(4, 2), 24, ValueError, "not 24"),
        (Dense(), 16, ValueError, "have summaries"),
        (Fixed(4, window=2), 16, ValueError, "have a window of 1"),
        (Window(4), 16, ValueError, "have summaries: a rank would need the last keys"),
        (HeavilyCompressed(4, 2), 16, ValueError, "have no window: a rank would need the last keys"),
        (Routing([0] * 32), 16, ValueError, "be of consecutive positions"),
        (Mixture(Fixed(4), LogSparse()), 16, ValueError, "have one softmax"),
        (Fixed(4).plan(32), 16, ValueError, "be of any length"),
        (Fixed, 16, TypeError, "got Fixed"),
        (None, 16, TypeError, "got NoneType"),
        ([], 16, TypeError, "got list"),
    ),
    ids=str,
)
def test_patterns_refused(pattern, n, error, says):
    with pytest.raises(error, match=f"pattern must .*{says}"):
        distributed.traffic(pattern, 2 * n, 2, heads=1, dim=8)


@pytest.fixture
def alone(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank(alone, rng):
    inputs = rng.standard_normal((3, 2, 16, 8))
    for pattern in (Fixed(4), LogSparse(), LogSparse(hierarchical=True), Tree(4), Axial(4, "rowmajor")):
        expected, saved = combiner.attention_forward(*inputs, pattern, is_causal=True)
        tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
        out = distributed.attention(*tensors, pattern, is_causal=True)
        np.testing.assert_allclose(out.detach(), expected, rtol=0, atol=1e-14)
        out.sum().backward()
        for x, exact in zip(tensors, combiner.attention_backward(np.ones_like(expected), saved)[:3], strict=True):
            np.testing.assert_allclose(x.grad, exact, rtol=0, atol=1e-14)


def test_arguments(alone):
    q = torch.zeros(2, 16, 8)

    def refuses(error, says, *inputs, pattern=CASES["fixed"][0], **options):
        with pytest.raises(error, match=says):
            distributed.attention(*inputs, pattern, **options)

    refuses(TypeError, "query must be a CPU tensor, got ndarray", q.numpy(), q, q)
    refuses(TypeError, "key must be a CPU tensor, got one on meta", q, q.to("meta"), q)
    refuses(ValueError, r"value must have shape \(..., heads, n, features\), got \(16, 8\)", q, q, q[0])
    refuses(TypeError, "key must be float32", q, q.double(), q)
    refuses(ValueError, "value must have shape", q, q, q[:, :8])
    refuses(TypeError, "query must be", q.int(), q.int(), q.int())
    refuses(TypeError, "is_causal must be a bool, got int", q, q, q, is_causal=1)
    refuses(ValueError, "scale must be finite", q, q, q, scale=float("inf"))
    refuses(TypeError, "scale must be a number, got a torch.Tensor", q, q, q, scale=torch.tensor(0.3))
    refuses(TypeError, "has no 'causal': is_causal=True is causality", q, q, q, causal=True)
    refuses(ValueError, "pattern must have summaries", q, q, q, pattern=Dense())
    refuses(ValueError, "softcap must be positive and finite, got -1", q, q, q, softcap=-1.0)
    refuses(TypeError, "softcap must be a number or None, got a torch.Tensor", q, q, q, softcap=torch.tensor(1.0))
    refuses(ValueError, r"key_bias must have shape \(Hk or Hq, 16\), got \(2, 15\)", q, q, q, key_bias=q[..., 1:, 0])
    refuses(TypeError, "key_bias must be torch.float32, as lse is", q, q, q, key_bias=q[..., 0].double())
    refuses(
        ValueError, r"region_bias must be of all 4 regions of the whole sequence, got shape \(2, 3\)", q, q, q,
        region_bias=torch.zeros(2, 3),
    )  # fmt: skip
    refuses(ValueError, "region_bias must have shape", q, q, q, region_bias=torch.zeros(3, 4))
    refuses(TypeError, "region_bias must be a torch.Tensor, got list", q, q, q, region_bias=[0.0] * 4)
    refuses(ValueError, r"sink must have shape \(2,\), got \(3,\)", q, q, q, sink=torch.zeros(3))


def test_sizes():
    def refuses(error, says, length=32, ranks=2, heads=1, dim=8, **sizes):
        for count in (functools.partial(distributed.traffic, Fixed(4)), distributed.ring_traffic):
            with pytest.raises(error, match=says):
                count(length, ranks, heads=heads, dim=dim, **sizes)

    refuses(ValueError, "length must be a multiple of ranks, 3, got 32", ranks=3)
    refuses(ValueError, "ranks must be at least 1", ranks=0)
    refuses(TypeError, "length must be an integer, got float", length=32.0)
    refuses(ValueError, "heads must be a multiple of key_heads, 2, got 3", heads=3, key_heads=2)
    for name in ("heads", "key_heads", "dim", "value_dim", "batch", "itemsize"):
        refuses(ValueError, f"{name} must be at least 1", **{name: 0})
    with pytest.raises(ValueError, match="bias_heads must be at least 0, got -1"):
        distributed.traffic(Fixed(4), 32, 2, heads=1, dim=8, bias_heads=-1)


def test_example():
    said = run_file("examples/sequence_parallel.py", "--length", "1024")  # it compares with one process
    assert "Fixed(span=64): loss" in said and "each rank sends 0.07 MB" in said
