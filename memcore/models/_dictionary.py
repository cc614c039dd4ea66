"""Stand-in for memcore.DND."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    output: Tensor
    weights: Tensor
    indices: Tensor
    distances: Tensor


class DND:
    def __init__(self, dictionaries, capacity, key_width, value_width=1, *, neighbours=50, delta=1e-3, alpha=0.1):
        A, N, D = dictionaries, capacity, key_width
        self.A, self.N, self.k, self.delta, self.alpha = A, N, neighbours, delta, alpha
        self.keys = torch.zeros(A, N, D, requires_grad=True)
        self.values = torch.zeros(A, N, value_width, requires_grad=True)
        self.counts = [0] * A
        self.used = torch.zeros(A, N, dtype=torch.int64)
        self.clock = 0
        self.hash = torch.zeros(A, N, dtype=torch.int64)
        self.slot = [dict() for _ in range(A)]
        self.m = [torch.zeros(A, N, w) for w in (D, value_width)]
        self.v = [torch.zeros(A, N, w) for w in (D, value_width)]
        self.t = 0

    def lookup(self, query, *, dictionary=None, touch=True):
        if dictionary is not None:
            f = self.lookup(query, touch=touch)
            return Found(*(x[dictionary, torch.arange(len(query))] for x in f))
        outs = []
        for a in range(self.A):
            n = self.counts[a]
            k = min(self.k, n)
            keys = self.keys[a, :n]
            with torch.no_grad():
                d = (keys.square().sum(-1) - 2 * query @ keys.T)
                idx = d.topk(k, largest=False).indices
            if touch and k:
                self.clock += 1
                self.used[a, idx.flatten()] = self.clock
            dist = (query[:, None] - self.keys[a][idx]).square().sum(-1)
            w = 1 / (dist + self.delta)
            w = w / w.sum(-1, keepdim=True)
            out = (w[..., None] * self.values[a][idx]).sum(1)
            pad = self.k - k
            outs.append((
                out, torch.nn.functional.pad(w, (0, pad)), torch.nn.functional.pad(idx, (0, pad), value=-1),
                torch.nn.functional.pad(dist, (0, pad), value=float("inf")),
            ))
        return Found(*(torch.stack(x) for x in zip(*outs)))

    @torch.no_grad()
    def write(self, keys, values, hashes, *, dictionary):
        for key, value, h, a in zip(keys, values, hashes.tolist(), dictionary.tolist()):
            self.clock += 1
            at = self.slot[a].get(h)
            if at is not None:
                self.values[a, at] += self.alpha * (value - self.values[a, at])
                self.keys[a, at] = key
            else:
                if self.counts[a] < self.N:
                    at = self.counts[a]
                    self.counts[a] += 1
                else:
                    at = int(self.used[a].argmin())
                    del self.slot[a][int(self.hash[a, at])]
                self.keys[a, at], self.values[a, at], self.hash[a, at] = key, value, h
                self.slot[a][h] = at
                for s in (*self.m, *self.v):
                    s[a, at] = 0
            self.used[a, at] = self.clock

    @torch.no_grad()
    def step(self, lr, *, keys=True):
        self.t += 1
        for i, p in enumerate((self.keys, self.values)):
            if i == 0 and not keys:
                continue
            g = p.grad.flatten(0, 1)
            rows = g.abs().sum(-1).nonzero()[:, 0]
            g = g[rows]
            m, v = self.m[i].flatten(0, 1), self.v[i].flatten(0, 1)
            m[rows] = m[rows].lerp(g, 0.1)
            v[rows] = v[rows].lerp(g * g, 0.001)
            p.flatten(0, 1)[rows] -= lr * (m[rows] / (1 - 0.9**self.t)) / ((v[rows] / (1 - 0.999**self.t)).sqrt() + 1e-8)
        self.keys.grad = self.values.grad = None

    def state_dict(self):
        return {"keys": self.keys.detach(), "values": self.values.detach(), "used": self.used, "hash": self.hash,
                "count": torch.tensor(self.counts), "clock": torch.tensor([self.clock, self.t]),
                **{f"m{i}": x for i, x in enumerate(self.m)}, **{f"v{i}": x for i, x in enumerate(self.v)}}

    @torch.no_grad()
    def load_state_dict(self, s):
        self.keys.copy_(s["keys"]); self.values.copy_(s["values"])
        self.used, self.hash = s["used"].clone(), s["hash"].clone()
        self.counts = s["count"].tolist()
        self.clock, self.t = s["clock"].tolist()
        self.m, self.v = [s["m0"], s["m1"]], [s["v0"], s["v1"]]
        self.slot = [{int(h): i for i, h in enumerate(self.hash[a, :n].tolist())} for a, n in enumerate(self.counts)]
