"""Random histories of a store against a plain Python dictionary: writes, lookups, deletions, training, saves, crashes."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from stores import KINDS, Model, check, kind_of_store

from memcore.stores import hash_rows

A, D, ALPHA, DELTA = 2, 3, 0.25, 1e-3
KEY = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=D, max_size=D)  # ties and exact sums
VALUE = st.sampled_from([-2.0, 0.125, 1.0, 3.0, float("nan"), float("inf")])
HASH = st.integers(0, 12)
DICTIONARY = st.integers(0, A - 1)


class Machine(RuleBasedStateMachine):
    kind, steps = "compiled", 0

    @initialize(N=st.sampled_from([1, 2, 5, 8]), bf16=st.booleans())
    def start(self, N, bf16):
        self.context = kind_of_store(self.kind)
        self.cls = self.context.__enter__()
        self.folder = Path(tempfile.mkdtemp())
        self.sizes = (A, N, D)
        self.settings = {"alpha": ALPHA, "delta": DELTA, "optimizer": "sgd", "bf16": bf16}
        self.store = self.cls.open(self.folder / "store", *self.sizes, **self.settings)
        self.model = Model(A, N, ALPHA)
        self.disk = self.model.copy()  # what a crash leaves
        self.waiting = []  # what a flush will do to it

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)
            self.context.__exit__(None, None, None)

    @rule(entries=st.lists(st.tuples(DICTIONARY, KEY, VALUE, HASH), max_size=6), hashed=st.booleans(), one=st.booleans())
    def write(self, entries, hashed, one):
        which = torch.tensor([e[0] for e in entries], dtype=torch.int64)
        if one:
            which[:] = which[0].clone() if len(entries) else 0
        keys = torch.tensor([e[1] for e in entries]).reshape(-1, D)
        values = torch.tensor([e[2] for e in entries])
        hashes = torch.tensor([e[3] for e in entries], dtype=torch.int64) if hashed else hash_rows(keys)
        self.store.write(keys, values, hashes if hashed else None, dictionary=int(which[0]) if one and len(entries) else which)
        done = []
        for a, key, value, hash in zip(which.tolist(), keys.numpy(), values.numpy(), hashes.tolist(), strict=True):
            slot = self.model.write(a, hash, key, value.reshape(1))
            if slot is not None:
                done.append((a, slot, hash))
        for a, slot, hash in done:
            content = self.model.entry[a].get(self.model.slots[a][slot])
            self.waiting.append(("put", a, slot, hash, content[0].copy(), content[1].copy()))

    @rule(queries=st.lists(KEY, min_size=1, max_size=3), k=st.integers(0, 5), touch=st.booleans(), own=st.booleans(), seed=st.integers(0, 9))
    def lookup(self, queries, k, touch, own, seed):
        query = torch.tensor(queries)
        which = torch.randint(A, (len(queries),), generator=torch.Generator().manual_seed(seed))
        found = self.store.lookup(query, k, touch=touch, dictionary=which if own else None)
        for q in range(len(queries)):
            for a in [int(which[q])] if own else range(A):
                near, output = self.model.read(a, query[q].numpy(), k, DELTA)
                at = (q,) if own else (a, q)
                assert found.indices[at].tolist() == near
                np.testing.assert_allclose(found.output[at].numpy(force=True), output, rtol=1e-5, atol=1e-6)
        if touch:
            for a in range(A):
                mine = found.indices[which == a] if own else found.indices[a]
                self.model.touch(a, mine.tolist())

    @rule(a=DICTIONARY, hash=HASH)
    def delete(self, a, hash):
        assert self.store.delete(hash, dictionary=a) == self.model.delete(a, hash)
        self.waiting.append(("delete", a, hash))

    @rule(a=DICTIONARY)
    def clear(self, a):
        self.store.clear(a)
        self.model.clear(a)
        self.waiting.append(("clear", a))

    @precondition(lambda self: any(self.model.slots))
    @rule(data=st.data())
    def train(self, data):
        """A gradient of a few rows; then entries may be written before the step uses it."""
        rows = data.draw(st.lists(st.sampled_from([(a, s) for a in range(A) for s in range(len(self.model.slots[a]))]), min_size=1, max_size=3, unique=True))
        at = torch.tensor(rows).T
        before = {row: self.model.slots[row[0]][row[1]] for row in rows}
        self.store.keys.grad = torch.sparse_coo_tensor(at, torch.ones(len(rows), D), self.store.keys.shape, check_invariants=True)
        self.store.values.grad = torch.sparse_coo_tensor(at, torch.full((len(rows), 1), 2.0), self.store.values.shape, check_invariants=True)
        replaced = set()
        for a, key, value, hash in data.draw(st.lists(st.tuples(DICTIONARY, KEY, VALUE, HASH), max_size=2)):
            self.write([(a, key, value, hash)], True, True)
            replaced |= {row for row, old in before.items() if self.model.slots[row[0]][row[1]] != old}
        self.store.step(0.5)
        for a, slot in rows:
            if (a, slot) in replaced:
                continue
            entry = self.model.entry[a][self.model.slots[a][slot]]
            entry[0], entry[1] = entry[0] - np.float32(0.5), entry[1] - np.float32(1)
            self.waiting.append(("rows", a, slot, entry[0].copy(), entry[1].copy()))

    @rule()
    def flush(self):
        self.store.flush()
        for what, a, *rest in self.waiting:
            if what == "put":
                self.disk.put(a, *rest)
            elif what == "rows":
                self.disk.entry[a][self.disk.slots[a][rest[0]]][:] = rest[1:]
            else:
                getattr(self.disk, what)(a, *rest)
        self.waiting = []

    @rule()
    def save(self):
        self.store.save()
        self.disk, self.waiting = self.model.copy(), []

    @rule(given=st.booleans())
    def crash(self, given):
        self.store._log.close()
        self.store._log = None
        self.store = self.cls.open(self.folder / "store", *self.sizes, **self.settings) if given else self.cls.open(self.folder / "store")
        self.model, self.waiting = self.disk.copy(), []

    @rule()
    def copy(self):
        self.store.save(self.folder / "copy")
        check(self.cls.load(self.folder / "copy"), self.model)

    @invariant()
    def same(self):
        if hasattr(self, "store"):
            type(self).steps += 1
            check(self.store, self.model)


@pytest.mark.parametrize("kind", KINDS)
def test_histories(kind):
    few = settings(max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(type("M", (Machine,), {"kind": kind}), settings=few)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_steps(kind):
    many = settings(max_examples=220, stateful_step_count=60, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
    machine = type("M", (Machine,), {"kind": kind, "steps": 0})
    run_state_machine_as_test(machine, settings=many)
    assert machine.steps >= 10_000, machine.steps
