"""What a store promises beside its content: gradients, optimizers, errors, processes."""

import copy
import multiprocessing
import os
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memcore
from memcore.functional import knn_lookup
from memcore.stores import DND, SGD, Adam, RMSProp, _table, hash_rows


def filled(cls=DND, A=2, N=40, D=5, V=1, n=30, **settings):
    store = cls(A, N, D, V, **{"neighbours": 4, **settings})
    for a in range(A):
        store.write(torch.randn(n, D), torch.randn(n, V), torch.arange(n), dictionary=a)
    return store


def test_literal_values():
    store = DND(1, 3, 1, neighbours=2, delta=0.5, alpha=0.25)
    store.write(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([8.0, 2.0, 100.0]), [7, 8, 9])
    found = store.lookup(torch.tensor([[0.5]]))
    assert found.output.tolist() == [[[5.0]]] and found.indices.tolist() == [[[0, 1]]] and found.weights.tolist() == [[[0.5, 0.5]]]
    store.write(torch.tensor([2.0]), 4.0, 7)  # met again: 8 + (4 - 8) / 4, and its key is 2 now
    assert store.lookup(torch.tensor([[2.0]]), 1).output.item() == 7
    store.write(torch.tensor([-1.0]), 1.0, 10)  # 9 was never returned nor written since: it goes
    assert store.find([7, 8, 9, 10]).tolist() == [0, 1, -1, 2]
    assert store.stats()[2:6] == (3, 1, 1, 0) and len(store) == 3


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("own", [False, True])
def test_lookup_is_knn_lookup_with_row_sparse_gradients(metric, own):
    kernel = "softmax" if metric == "ip" else "inverse_distance"
    store = filled(dtype=torch.float64, metric=metric, kernel=kernel, delta=0.3, V=2)
    query = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    query.data[0] = store.keys[1, 3].detach()  # an exact hit
    which = torch.tensor([1, 0, 1, 1, 0, 0])
    found = store.lookup(query, dictionary=which if own else None)
    leaves = [t.detach()[:, :30].clone().requires_grad_() for t in (store.keys, store.values)]
    plain = knn_lookup(query, *leaves, 4, metric=metric, kernel=kernel, delta=0.3)
    if own:
        plain = type(plain)(*(t[which, torch.arange(6)] for t in plain))
    mix = [torch.randn_like(t) for t in (plain.output, plain.weights, plain.distances)]
    for of in (found, plain):
        loss = sum((m * t).sum() for m, t in zip(mix, (of.output, of.weights, of.distances), strict=True))
        loss.backward()
        if of is found:
            ours, query.grad = query.grad, None
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours, query.grad, rtol=1e-8, atol=1e-10)
    for ring, leaf in zip((store.keys, store.values), leaves, strict=True):
        assert ring.grad.is_sparse
        torch.testing.assert_close(ring.grad.to_dense()[:, :30], leaf.grad, rtol=1e-8, atol=1e-10)
        named = {tuple(i) for i in ring.grad.coalesce().indices().T.tolist()}
        owners = which[:, None].expand(6, 4) if own else torch.arange(2)[:, None, None].expand(2, 6, 4)
        assert named == set(zip(owners.flatten().tolist(), found.indices.flatten().tolist(), strict=True))


def test_gradcheck_with_an_exact_hit():
    store = filled(A=1, N=8, n=8, D=3, dtype=torch.float64, delta=0.1)
    keys, values = store.keys.detach().clone(), store.values.detach().clone()
    query = torch.cat([torch.randn(2, 3, dtype=torch.float64), keys[0, 2:3]])

    def read(q, k, v):
        with torch.no_grad():
            store.keys.copy_(k), store.values.copy_(v)
            store._rings.set_keys(torch.arange(8), k[0])
        out = store.lookup(q + 0, touch=False).output
        gq, gk, gv = torch.autograd.grad(out.sum(), (q, store.keys, store.values)) if torch.is_grad_enabled() and q.requires_grad else (None,) * 3
        return out, gq, gk, gv

    _, gq, gk, gv = read(query.clone().requires_grad_(), keys, values)
    for at, grad in ((0, gq), (1, gk.to_dense()), (2, gv.to_dense())):
        parts = [query, keys, values]
        numeric = torch.zeros_like(parts[at])
        for i in range(numeric.numel()):
            sides = []
            for e in (1e-6, -1e-6):
                moved = [p.clone() for p in parts]
                moved[at].view(-1)[i] += e
                sides.append(read(*moved)[0].sum().item())
            numeric.view(-1)[i] = (sides[0] - sides[1]) / 2e-6
        torch.testing.assert_close(grad, numeric, rtol=1e-5, atol=1e-6)


def test_gradients_of_two_lookups_add_up_and_a_write_between_is_an_error(Store):
    store = filled(Store)
    query = torch.randn(3, 5)
    store.lookup(query).output.sum().backward()
    once = store.values.grad.to_dense()
    store.lookup(query).output.sum().backward()
    torch.testing.assert_close(store.values.grad.to_dense(), 2 * once)
    for change in (lambda: store.write(torch.randn(1, 5), 1.0, dictionary=0), lambda: store.delete(3, dictionary=0), lambda: store.step(0.1)):
        for own in (None, 0):
            store.values.grad = torch.sparse_coo_tensor([[0], [1]], [[1.0]], store.values.shape, check_invariants=True)
            found = store.lookup(query, dictionary=own)
            change()
            for t in (found.output, found.weights, found.distances):
                with pytest.raises(RuntimeError, match="memcore.DND.lookup: the store was changed between this lookup and its backward"):
                    t.sum().backward(retain_graph=True)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (SGD(), lambda p: torch.optim.SGD(p, 0.05)),
        (RMSProp(0.9, 1e-3), lambda p: torch.optim.RMSprop(p, 0.05, 0.9, 1e-3)),
        (Adam((0.8, 0.95), 1e-4), lambda p: torch.optim.SparseAdam(p, 0.05, (0.8, 0.95), 1e-4)),
    ],
    ids=["sgd", "rmsprop", "adam"],
)
def test_steps_are_torchs_on_the_rows_used(ours, theirs, keys, Store):
    """One row a parameter of torch's optimizer, which steps when the row is used: its state is its own."""
    torch.manual_seed(1)
    store = filled(Store, optimizer=ours, dtype=torch.float64, V=2)
    params = {}
    for step in range(8):
        before = [t.detach().clone() for t in (store.keys, store.values)]
        (store.lookup(torch.randn(2, 5, dtype=torch.float64)).output ** 2).sum().backward()
        grads = [t.grad.coalesce() for t in (store.keys, store.values)]
        store.step(0.05, keys=keys)
        for i, (grad, ring) in enumerate(zip(grads, (store.keys, store.values), strict=True)):
            want = before[i]
            if i or keys:
                for at, row in zip(grad.indices().T.tolist(), grad.values(), strict=True):
                    leaf, optimizer = params.get((i, *at), (None, None))
                    if leaf is None:
                        leaf = want[tuple(at)].clone().requires_grad_()
                        optimizer = theirs([leaf])
                        params[i, *at] = leaf, optimizer
                    leaf.grad = row.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else row.clone()
                    optimizer.step()
                    want[tuple(at)] = leaf.detach()
            torch.testing.assert_close(ring.detach(), want, rtol=1e-12, atol=1e-14)
        assert store.keys.grad is None and store.values.grad is None
        if step == 4:  # a replaced row starts afresh, one met again keeps its state
            store.write(torch.randn(14, 5, dtype=torch.float64), torch.randn(14, 2, dtype=torch.float64), torch.arange(100, 114), dictionary=1)
            store.write(torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64), [3], dictionary=0)
            new = set(store.find(list(range(100, 114)), dictionary=1).tolist())
            params = {key: v for key, v in params.items() if not (key[1] == 1 and key[2] in new)}
            for (_, a, slot), (leaf, _) in params.items():
                if (a, slot) == (0, int(store.find(3, dictionary=0))):
                    leaf.data = (store.keys if leaf.numel() == 5 else store.values)[a, slot].detach().clone()
    assert len(params) > 20


def test_steps_follow_the_norms_and_the_mirror(Store):
    store = filled(Store, bf16=True)
    store.lookup(torch.randn(5, 5)).output.square().sum().backward()
    store.step(0.5)
    keys = store.keys.detach()[:, :30]
    torch.testing.assert_close(store._rings.norms[:, :30], keys.square().sum(-1))
    assert torch.equal(store._rings.mirror[:, :30], keys.bfloat16())
    lost = ((keys - keys.bfloat16().float()).norm(dim=-1) / keys.norm(dim=-1)).amax(-1)
    assert (store._rings.rounding >= lost).all() and (store._rings.rounding < 2**-8).all()


def test_steps_that_would_make_a_row_nan_are_refused():
    store = filled(optimizer="sgd")
    before = store.values.detach().clone()
    store.values.grad = torch.sparse_coo_tensor([[0, 0], [1, 2]], [[float("nan")], [1.0]], store.values.shape, check_invariants=True)
    store.step(1.0)
    before[0, 2] -= 1
    assert torch.equal(store.values.detach(), before)
    assert store.stats().rows_refused == 1 and store.stats().rows_trained == 2


def test_a_dense_gradient_trains_its_nonzero_rows():
    store = filled(optimizer=Adam())
    store.values.grad = torch.zeros_like(store.values)
    store.values.grad[1, 5] = 2
    before = store.values.detach().clone()
    store.step(0.1)
    assert (store.values.detach() != before).nonzero().tolist() == [[1, 5, 0]]


def test_rejected_entries_are_counted_and_not_stored(Store):
    store = Store(1, 5, 2)
    nan, inf = float("nan"), float("inf")
    store.write(torch.tensor([[1.0, nan], [inf, 0], [1, 2], [3, 4]]), torch.tensor([1.0, 1, -inf, 5]))
    assert store.counts == [1] and store.stats().rejected == 3 and store.values[0, 0].item() == 5
    store.write(torch.tensor([[3e38, 3e38]]), torch.tensor([3e38]), 1)
    store.write(torch.tensor([[3e38, 3e38]]), torch.tensor([-3e38]), 1)
    assert store.values[0, 1].item() == pytest.approx(0.8 * 3e38, rel=1e-6)  # v_new - v overflows


def test_a_batch_is_its_entries_one_after_another(Store):
    """Duplicates, evictions of what the same batch wrote, updates between them: all orders of everything."""
    torch.manual_seed(2)
    for trial in range(20):
        n = 30
        keys, values = torch.randn(n, 2), torch.randn(n)
        hashes, which = torch.randint(0, 6, (n,)), torch.randint(0, 2, (n,))
        batch, single = Store(2, 3, 2, optimizer="adam"), Store(2, 3, 2, optimizer="adam")
        batch.write(keys, values, hashes, dictionary=which)
        for i in range(n):
            single.write(keys[i], values[i], int(hashes[i]), dictionary=int(which[i]))
        a, b = batch.state_dict(), single.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a), trial
        assert batch.stats() == single.stats()


class _Tensor(torch.Tensor):
    """Not plain, so that it takes the long way."""


def test_tensors_of_every_form_are_written_alike(Store):
    """Plain tensors take a short way (write_tensors), all others and a store with a log or a searcher the long one."""
    g = torch.Generator().manual_seed(0)
    keys, values, hashes = torch.randn(6, 5, generator=g), torch.randn(6, 2, generator=g), torch.tensor([3, 1, 4, 1, 5, 9])
    keys[4, 2] = float("nan")
    forms = {
        "plain": lambda t: t,
        "later columns": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() == 2 else torch.stack([t, t], 1)[:, 0],
        "an offset": lambda t: torch.cat([t[:1], t])[1:],
        "transposed": lambda t: t.t().contiguous().t(),
        "of another type": lambda t: t.double() if t.is_floating_point() else t.view(torch.uint64),
        "a leaf": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t.tolist(),
        "subclass": lambda t: t.as_subclass(_Tensor),
    }
    stores = {}
    for name, form in forms.items():
        stores[name] = store = Store(2, 4, 5, 2, dtype=torch.float32)
        store.write(form(keys), form(values), form(hashes), dictionary=1)
        store.write(form(keys[:1]), form(values[:1]), dictionary=0)
        assert (store.stats().rejected, len(store)) == (1, 5), name
    plain = stores["plain"]
    assert plain.find([3, 1, 4, 5, 9], dictionary=1).tolist() == [0, 1, 2, -1, 3]
    for name, store in stores.items():
        for a, b in ((store.keys, plain.keys), (store.values, plain.values)):
            assert torch.equal(a, b), name
        assert store.find([3, 1, 4, 9], dictionary=1).tolist() == [0, 1, 2, 3], name
    if plain._write_plain is not None:
        short = {name: stores[name]._write_plain(form(keys), form(values), form(hashes), 1, 0.1) for name, form in forms.items()}
        assert [name for name, taken in short.items() if taken] == ["plain", "an offset"]
        for which in (None, 2, -1, 2**70, True, torch.tensor(1)):
            assert plain._write_plain(keys, values, hashes, which, 0.1) is False
        with pytest.raises(TypeError):
            plain._write_plain(keys, values, hashes, 1, "0.1")
        with pytest.raises(TypeError, match="5 arguments"):
            plain._write_plain(keys, values)
    with pytest.raises(ValueError, match="'dictionary' must be"):
        plain.write(keys, values, hashes, dictionary=2)
    with pytest.raises(ValueError, match="'hashes' must have shape"):
        plain.write(keys, values, hashes[1:], dictionary=1)


def test_hashes(Store):
    rows = torch.randn(200, 7)
    hashes = hash_rows(rows)
    assert len(set(hashes.tolist())) == 200 and hash_rows(rows[:, :6]).tolist() == hash_rows(rows[:, :6].contiguous()).tolist()
    assert hash_rows(torch.zeros(1, 0)).shape == (1,) and hash_rows(torch.zeros(0, 3)).shape == (0,)
    assert hash_rows(torch.tensor([[0.0]])) != hash_rows(torch.tensor([[-0.0]]))
    assert hash_rows(torch.tensor([[1, 2, 3]], dtype=torch.uint8)) != hash_rows(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8))
    flips = hash_rows(torch.eye(64, dtype=torch.float64)).numpy().view(np.uint64)
    ones = np.unpackbits(flips.view(np.uint8)).mean()
    assert 0.45 < ones < 0.55
    store = Store(1, 10, 7)
    store.write(rows[:2], torch.zeros(2), [2**64 - 1, 5])
    assert store.find(torch.tensor([-1, 5])).tolist() == [0, 1]
    if _table.compiled is not None:  # the same in Python: files go from one to the other
        compiled, _table.compiled = _table.compiled, None
        try:
            for of in (rows, rows[:, :5].half(), rows.double()[:, :1], torch.zeros(2, 0)):
                _table.compiled = None
                plain = hash_rows(of)
                _table.compiled = compiled
                assert torch.equal(plain, hash_rows(of))
        finally:
            _table.compiled = compiled


def test_touch_and_no_touch(Store):
    store = Store(1, 3, 1, neighbours=1)
    store.write(torch.tensor([[0.0], [1.0], [2.0]]), torch.zeros(3), [0, 1, 2])
    store.lookup(torch.tensor([[0.0]]), touch=False)
    store.touch(torch.tensor([[[1, -1]]]))
    store.write(torch.tensor([[5.0]]), 0.0, 3)
    assert store.find([0, 1, 2, 3]).tolist() == [-1, 1, 2, 0]


@pytest.mark.parametrize("own", [False, True])
def test_neighbours_count_as_used_in_their_order(Store, own):
    store = Store(1, 5, 1, neighbours=2)
    store.write(torch.arange(5.0)[:, None], torch.zeros(5), range(5))
    query = torch.tensor([[3.1], [1.1], [3.1]])  # 3 then 4 nearest; 1, 2; 3, 4
    store.lookup(query, dictionary=torch.zeros(3, dtype=torch.int64) if own else None)
    assert store.state_dict()["order"].tolist() == [0, 2, 1, 4, 3]


def test_a_deletion_moves_the_last_entry_with_all_that_is_its(Store):
    store = Store(1, 3, 2, neighbours=1)
    store.write(torch.eye(3)[:, :2], torch.tensor([1.0, 2.0, 3.0]), [10, 11, 12])
    store.lookup(torch.tensor([[0.0, 0.0]])).output.sum().backward()  # trains and uses 12
    store.step(0.1)
    store.lookup(torch.tensor([[0.0, 1.0]]))  # then 11 is used
    before = store.state_dict()
    store.delete(10)
    after = store.state_dict()
    assert after["hashes"].tolist() == [12, 11] and after["order"].tolist() == [0, 1]
    for name in ("keys", "values", "values.exp_avg", "steps"):
        assert torch.equal(after[name], before[name][[2, 1]])
    assert after["steps"][0].tolist() != [0, 0]
    store.write(torch.ones(2, 2), torch.ones(2), [13, 14])  # 13 is new, 14 takes the place of 12
    assert store.find([11, 12, 13, 14]).tolist() == [1, -1, 2, 0]


BAD = {
    "capacity 0": (lambda s: DND(1, 0, 3), ValueError, "memcore.DND: 'capacity' must be at least 1, got 0"),
    "dictionaries": (lambda s: DND(0, 4, 3), ValueError, "'dictionaries' must be at least 1"),
    "float capacity": (lambda s: DND(1, 4.0, 3), TypeError, "'capacity' must be an int, got float"),
    "huge": (lambda s: DND(1, 2**31, 3), ValueError, "'capacity' must be at most"),
    "negative K": (lambda s: DND(1, 4, 3, neighbours=-1), ValueError, "'neighbours' must be at least 0, got -1"),
    "alpha": (lambda s: DND(1, 4, 3, alpha=1.5), ValueError, "'alpha' must be between 0 and 1, got 1.5"),
    "delta": (lambda s: DND(1, 4, 3, delta=0.0), ValueError, "'delta' must be > 0, got 0.0"),
    "metric": (lambda s: DND(1, 4, 3, metric="l1"), ValueError, "'metric' must be 'l2', 'cosine' or 'ip', got 'l1'"),
    "dtype": (lambda s: DND(1, 4, 3, dtype=torch.float16), TypeError, "'dtype' must be torch.float32 or torch.float64"),
    "optimizer": (lambda s: DND(1, 4, 3, optimizer="adamw"), ValueError, "'optimizer' must be one of sgd, rmsprop, adam"),
    "query width": (lambda s: s.lookup(torch.zeros(2, 4)), ValueError, "'query' must have shape (Q, D) or (A, Q, D) with (A, D) = (2, 5), got (2, 4)"),
    "query dictionaries": (lambda s: s.lookup(torch.zeros(3, 2, 5)), ValueError, "'query' must have shape (A, Q, D) with A = 2, got (3, 2, 5)"),
    "query type": (lambda s: s.lookup([[0.0] * 5]), TypeError, "'query' must be a tensor, got list"),
    "query ints": (lambda s: s.lookup(torch.zeros(2, 5, dtype=torch.int64)), TypeError, "'query' must be float64"),
    "lookup k": (lambda s: s.lookup(torch.zeros(2, 5), -2), ValueError, "memcore.DND.lookup: 'k' must be at least 0, got -2"),
    "lookup dictionary": (lambda s: s.lookup(torch.zeros(2, 5), dictionary=2), ValueError, "'dictionary' must be less than 2, got 2"),
    "lookup dictionaries": (lambda s: s.lookup(torch.zeros(2, 5), dictionary=torch.tensor([0, 2])), ValueError, "'dictionary' must be 0..1, got 0..2"),
    "key width": (lambda s: s.write(torch.zeros(2, 4), torch.zeros(2), dictionary=0), ValueError, "'keys' must have shape (n, D) or (D) with D = 5, got (2, 4)"),
    "values": (lambda s: s.write(torch.zeros(2, 5), torch.zeros(3), dictionary=0), ValueError, "'values' must have shape (n, V) = (2, 1) to match 'keys' (2, 5), got (3,)"),
    "keys type": (lambda s: s.write([[0.0] * 5], torch.zeros(1), dictionary=0), TypeError, "'keys' must be a tensor, got list"),
    "int values": (lambda s: s.write(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), dictionary=0), TypeError, "'values' must be floating"),
    "hashes": (lambda s: s.write(torch.zeros(2, 5), torch.zeros(2), [1], dictionary=0), ValueError, "'hashes' must have shape (n) = (2,) to match 'keys', got (1,)"),
    "hash type": (lambda s: s.write(torch.zeros(1, 5), torch.zeros(1), torch.zeros(1), dictionary=0), TypeError, "'hashes' must be int64, got torch.float32"),
    "no dictionary": (lambda s: s.write(torch.zeros(1, 5), torch.zeros(1)), ValueError, "memcore.DND.write: 'dictionary' must be given, as there are 2"),
    "dictionary -1": (lambda s: s.write(torch.zeros(1, 5), torch.zeros(1), dictionary=-1), ValueError, "'dictionary' must be at least 0, got -1"),
    "dictionary bool": (lambda s: s.write(torch.zeros(1, 5), torch.zeros(1), dictionary=True), TypeError, "'dictionary' must be an int, got bool"),
    "dictionary shape": (lambda s: s.write(torch.zeros(2, 5), torch.zeros(2), dictionary=torch.zeros(3, dtype=torch.int64)), ValueError, "'dictionary' must have shape (2,), got (3,)"),
    "delete": (lambda s: s.delete(1), ValueError, "memcore.DND.delete: 'dictionary' must be given"),
    "touch": (lambda s: s.touch(torch.zeros(2, 1)), TypeError, "'indices' must be an int64 tensor, got torch.float32"),
    "touch shape": (lambda s: s.touch(torch.zeros(3, 1, 1, dtype=torch.int64)), ValueError, "'indices' must have shape (A, Q, K) with A = 2"),
    "lr": (lambda s: s.step(-1.0), ValueError, "memcore.DND.step: 'lr' must be at least 0, got -1.0"),
    "lr nan": (lambda s: s.step(float("nan")), ValueError, "'lr' must be finite, got nan"),
    "no optimizer": (lambda s: DND(1, 4, 3, optimizer=None).step(0.1), RuntimeError, "the store was made with optimizer=None"),
    "state": (lambda s: s.load_state_dict(DND(2, 40, 6).state_dict()), ValueError, "memcore.DND.load_state_dict: 'keys' must have shape (0, 5), got (0, 6)"),
    "flush": (lambda s: s.flush(), ValueError, "must have been opened from a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_in_words(name):
    call, error, words = BAD[name]
    store = filled()
    before = store.state_dict()
    with pytest.raises(error) as e:
        call(store)
    assert words in str(e.value) and str(e.value).startswith("memcore.")
    after = store.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_copies_and_pickles(Store):
    store = filled(Store)
    other = copy.deepcopy(store)
    other.write(torch.zeros(1, 5), 1.0, dictionary=0)
    assert other.counts == [31, 30] and store.counts == [30, 30]
    address = store.keys.data_ptr()
    make, arguments = store.__reduce__()
    reader = make(*arguments)
    store.write(torch.full((1, 5), 9.0), 4.0, 77, dictionary=0)  # after the rows have moved into shared memory
    assert store.keys.data_ptr() != address
    assert reader.lookup(torch.full((1, 5), 9.0), 1).output[0].item() == 4 and reader.counts == store.counts
    for call in (lambda: reader.write(torch.zeros(1, 5), 1.0, dictionary=0), lambda: reader.step(0.1), lambda: reader.delete(1, dictionary=0)):
        with pytest.raises(RuntimeError, match=r"memcore.DND.\w+: this is a reader of a store that another process writes"):
            call()


def _read(reader, start, out):
    start.wait()
    out.put(reader.lookup(torch.full((1, 5), 9.0), 1).output[0].item())


def test_a_spawned_process_reads_what_is_written_later():
    store = filled()
    context = torch.multiprocessing.get_context("spawn")
    start, out = context.Event(), context.Queue()
    child = context.Process(target=_read, args=(store, start, out))
    child.start()
    store.write(torch.full((1, 5), 9.0), 4.0, dictionary=0)
    start.set()
    assert out.get(timeout=120) == 4
    child.join()


def _use(store, out):
    said = []
    for call in (lambda: store.lookup(torch.zeros(1, 5)), lambda: store.write(torch.zeros(1, 5), 0.0, dictionary=0), lambda: store.state_dict()):
        try:
            call()
            said.append("worked")
        except RuntimeError as e:
            said.append(str(e))
    out.put(said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_told_to_use_spawn():
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    child = context.Process(target=_use, args=(filled(), out))
    child.start()
    said = out.get(timeout=60)
    child.join()
    assert len(said) == 3 and all("the process forked" in s and "get_context('spawn')" in s for s in said), said


def test_threads_that_read_see_whole_entries(Store):
    """Every entry written has a key and a value of one number: a read of the nearest must find both alike."""
    store = Store(1, 64, 256, neighbours=1, alpha=1.0)
    store.write(torch.zeros(1, 256), 0.0, 0)
    stop, wrong, reads = threading.Event(), [], Counter()

    def read():
        while not stop.is_set():
            found = store.lookup(torch.full((4, 256), 5.0))
            value = found.output[0, 0, 0].item()
            distance = found.distances[0, 0, 0].item()
            if abs(distance - 256 * (5 - value) ** 2) > 1e-2 * max(1.0, distance):
                wrong.append((value, distance))
            reads["n"] += 1

    threads = [threading.Thread(target=read) for _ in range(2)]
    for t in threads:
        t.start()
    for i in range(300):
        n = float(i % 5)
        store.write(torch.full((1, 256), n), torch.tensor([[n]]), 0)
    stop.set()
    for t in threads:
        t.join()
    assert not wrong and reads["n"] > 0


def test_no_rows_are_touched_that_no_lookup_found():
    """A step's cost does not depend on N: as many operators, and none the size of the ring."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor) and a.layout == torch.strided}
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.layout == torch.strided and t.untyped_storage().data_ptr() not in given:
                    self.made = max(self.made, t.untyped_storage().nbytes())
            return out

    store = DND(1, 100_000, 16, neighbours=5)
    store.write(torch.randn(100, 16), torch.randn(100))
    loss = store.lookup(torch.randn(3, 16)).output.sum()
    with Largest() as seen:
        loss.backward()
        store.step(0.1)
    assert 0 < seen.made < 100_000


def test_told_once_when_the_table_is_not_built(monkeypatch, caplog):
    from memcore import _backend

    monkeypatch.setattr(_table, "compiled", None)
    monkeypatch.setattr(_table, "missing", "it is not built")
    monkeypatch.setattr(_backend, "_told", set())
    for _ in range(3):
        DND(1, 2, 3)
    told = [r.message for r in caplog.records if "DND" in r.message]  # plain PyTorch is told of beside it
    assert told == ["memcore.DND keeps its slot table in Python: it is not built"]


def test_public_name():
    assert memcore.DND is DND and memcore.stores.hash_rows is hash_rows


@pytest.mark.skipif(memcore._backend.native is None, reason="needs the native library")
def test_huge_pages_are_asked_for_before_anything_is_written():
    """A page that was touched stays as it is."""

    class Writes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            made = op(*args, **(kwargs or {}))
            tensor = made if made is not None else args[0]
            if isinstance(tensor, torch.Tensor):
                self.seen.append((op._schema.name.partition("::")[2], tensor.data_ptr()))
            return made

    with Writes() as writes:
        store = memcore.DND(2, 300, 8, bf16=True)
    for ring in (store.keys, store.values, store._rings.norms, store._rings.mirror):
        assert [name for name, at in writes.seen if at == ring.data_ptr()][:3] == ["empty", "_ask_huge_pages", "zero_"]
        assert not ring.detach().any()
