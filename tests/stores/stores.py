"""Stores of every kind under test, and a dictionary in plain Python that says what they should hold."""

import contextlib

import numpy as np
import torch

from memcore.stores import DND, _table

KINDS = ("compiled", "python", "device") if _table.compiled is not None else ("python", "device")


class OnDevice(DND):
    """A store that goes the way of a GPU's, on the CPU: rows written as tensors, the order of use in stamps."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._direct = False
        self._choose()
        self._rings.stamps = torch.zeros(self.dictionaries * self.capacity, dtype=torch.int64)


@contextlib.contextmanager
def kind_of_store(kind):
    """The class to make stores of; "python" has no compiled table meanwhile."""
    before = _table.compiled
    if kind == "python":
        _table.compiled = None
    try:
        yield OnDevice if kind == "device" else DND
    finally:
        _table.compiled = before


class Model:
    """A dictionaries of N entries: what each slot holds, and the order of use, the oldest first."""

    def __init__(self, A, N, alpha):
        self.A, self.N, self.alpha = A, N, alpha
        self.slots = [[] for _ in range(A)]  # hashes
        self.order = [[] for _ in range(A)]  # hashes
        self.entry = [{} for _ in range(A)]  # hash -> [key, value], float32

    def copy(self):
        other = Model(self.A, self.N, self.alpha)
        other.slots = [list(s) for s in self.slots]
        other.order = [list(s) for s in self.order]
        other.entry = [{h: [k.copy(), v.copy()] for h, (k, v) in e.items()} for e in self.entry]
        return other

    def write(self, a, hash, key, value):
        """One entry; returns the slot."""
        if not (np.isfinite(key).all() and np.isfinite(value).all()):
            return None
        key, value = key.astype(np.float32), value.astype(np.float32)
        if hash in self.entry[a]:
            old = self.entry[a][hash][1].astype(np.float64)
            value = ((1 - self.alpha) * old + self.alpha * value.astype(np.float64)).astype(np.float32)
            self.order[a].remove(hash)
        elif len(self.slots[a]) < self.N:
            self.slots[a].append(hash)
        else:
            victim = self.order[a].pop(0)
            self.slots[a][self.slots[a].index(victim)] = hash
            del self.entry[a][victim]
        self.entry[a][hash] = [key, value]
        self.order[a].append(hash)
        return self.slots[a].index(hash)

    def put(self, a, slot, hash, key, value):
        """What the log says: this entry in this slot."""
        if slot < len(self.slots[a]):
            old = self.slots[a][slot]
            self.order[a].remove(old)
            del self.entry[a][old]
            self.slots[a][slot] = hash
        else:
            self.slots[a].append(hash)
        self.entry[a][hash] = [key, value]
        self.order[a].append(hash)

    def touch(self, a, indices):
        for per_query in indices:
            for slot in reversed(per_query):
                if slot >= 0:
                    hash = self.slots[a][slot]
                    self.order[a].remove(hash)
                    self.order[a].append(hash)

    def delete(self, a, hash):
        if hash not in self.entry[a]:
            return False
        slot = self.slots[a].index(hash)
        last = self.slots[a].pop()
        if last != hash:
            self.slots[a][slot] = last
        self.order[a].remove(hash)
        del self.entry[a][hash]
        return True

    def clear(self, a):
        self.slots[a], self.order[a], self.entry[a] = [], [], {}

    def read(self, a, query, k, delta):
        """(slots, output) of one query, by distance and slot."""
        keys = [self.entry[a][h][0].astype(np.float64) for h in self.slots[a]]
        d = np.array([((query.astype(np.float64) - key) ** 2).sum() for key in keys])
        near = sorted(range(len(d)), key=lambda s: (d[s], s))[:k]
        w = 1 / (d[near] + delta) if near else np.zeros(0)
        output = sum((wi * self.entry[a][self.slots[a][s]][1] for wi, s in zip(w / w.sum(), near, strict=True)), np.zeros(1))
        return near + [-1] * (k - len(near)), output


def check(store, model):
    """The store holds what the model holds, in the same slots and the same order of use."""
    state = store.state_dict()
    assert store.counts == [len(s) for s in model.slots] and len(store) == sum(store.counts)
    at = 0
    for a in range(model.A):
        n = len(model.slots[a])
        hashes = state["hashes"][at : at + n].tolist()
        assert hashes == model.slots[a]
        assert [hashes[s] for s in state["order"][at : at + n].tolist()] == model.order[a]
        for i, hash in enumerate(hashes):
            key, value = model.entry[a][hash]
            np.testing.assert_array_equal(state["keys"][at + i].numpy(), key)
            np.testing.assert_array_equal(state["values"][at + i].numpy(), value)
            row = a * model.N + i
            torch.testing.assert_close(store._rings.norms.view(-1)[row], torch.from_numpy(key).square().sum())
            if store.bf16:
                assert torch.equal(store._rings.mirror.flatten(0, 1)[row], torch.from_numpy(key).bfloat16())
        at += n
