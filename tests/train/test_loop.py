"""The training loop: exact resume, repeatability, interruption, divergence, stopping, settings."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

import memcore
from memcore.tasks import make
from memcore.train import Diverged, GravesRMSProp, Interrupted, evaluate, load_checkpoint, loop, train, update

pytest.importorskip("safetensors")


def small(kind="lstm", seed=0):
    torch.manual_seed(seed)
    if kind == "lstm":
        return memcore.LSTMBaseline(4, 3, hidden_size=6, num_layers=1)
    return memcore.NTM(4, 3, memory_slots=6, slot_width=4, controller_size=5)


def task(**more):
    return make("copy", bits=3, max_length=4, **more)


class Meddling:
    """A task that calls `act` when the nth batch is drawn, and may spoil its loss."""

    def __init__(self, inner, nth, act=None, spoil=None):
        self.inner, self.nth, self.act, self.spoil, self.drawn = inner, nth, act, spoil, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def sample(self, batch_size, **how):
        if batch_size == SETTINGS["batch_size"]:
            self.drawn += 1
            if self.drawn == self.nth and self.act:
                self.act()
        return self.inner.sample(batch_size, **how)

    def loss(self, output, batch):
        loss = self.inner.loss(output, batch)
        return self.spoil(loss) if self.spoil and self.drawn == self.nth else loss


SETTINGS = {"batch_size": 5, "lr": 1e-2, "eval_every": 4, "eval_sequences": 8}


def rows(folder):
    found = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def same(a, b):
    a, b = load_checkpoint(a / "checkpoint.safetensors"), load_checkpoint(b / "checkpoint.safetensors")
    for group in ("model", "generators"):
        for key, value in getattr(a, group).items():
            assert torch.equal(value, getattr(b, group)[key]), key
    for i, entries in a.optimizer["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, b.optimizer["state"][i][key]), (i, key)
    assert a.meta["train"]["sums"] == b.meta["train"]["sums"]


@pytest.mark.parametrize(
    "kind, settings, signum",
    [
        ("lstm", {"optimizer": "adam", "schedule": "cosine", "clip_norm": 0.5}, signal.SIGINT),
        ("ntm", {"optimizer": "rmsprop", "clip_value": 0.01}, signal.SIGTERM),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, settings, signum):
    settings = {**SETTINGS, **settings, "steps": 14}
    train(small(kind), task(), out=tmp_path / "a", **settings)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = Meddling(task(), 6, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match="interrupted at update 6 of 14; saved to .*checkpoint.safetensors") as e:
        train(small(kind), stop, out=tmp_path / "b", **settings)
    assert e.value.signum == signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [r["step"] for r in rows(tmp_path / "b")] == [4]
    with open(tmp_path / "b" / "curve.jsonl", "a") as f:  # a row of later updates, and half a row of a crash
        f.write('{"step": 8, "loss": 1}\n{"step": 12, "lo')
    torch.manual_seed(1234)  # another process would start elsewhere
    result = train(small(kind, seed=5), task(), out=tmp_path / "b", resume=True, **settings)
    assert result.updates == 14 and result.sequences == 70 and result.stopped == "steps"
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert [r["step"] for r in rows(tmp_path / "b")] == [4, 8, 12, 14]
    same(tmp_path / "a", tmp_path / "b")


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small(), task(), steps=6, out=tmp_path / name, seed=seed, **SETTINGS)
    same(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


@pytest.mark.parametrize("stop", [None, 6, 13])
def test_the_best_weights_are_kept_also_through_a_resume(tmp_path, stop):
    """A learning rate that ruins what was learned: the lowest validation loss is not the last."""
    settings = {**SETTINGS, "lr": 0.3, "steps": 20, "keep": "best"}
    model = small()
    if stop is not None:
        with pytest.raises(Interrupted):
            train(model, Meddling(task(), stop, lambda: os.kill(os.getpid(), signal.SIGINT)), out=tmp_path, **settings)
        model = small(seed=5)
    result = train(model, task(), out=tmp_path, resume=stop is not None, **settings)
    losses = [row["eval_loss"] for row in result.curve]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert best < len(losses) - 1 and result.kept == result.curve[best]["step"] < result.updates
    score = {"sequences": 8, "batch_size": 1, "seed": loop.VALIDATION_SEED, "settings": {"": {}}}
    assert evaluate(model, task(), **score)[""]["loss"] == pytest.approx(losses[best], rel=1e-6)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.safetensors")
    other = small(seed=7)
    checkpoint.restore(other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert any(not torch.equal(v, checkpoint.model[k]) for k, v in checkpoint.best.items())
    last = small()
    assert train(last, task(), **{**settings, "keep": "last"}).kept == 20
    assert all(torch.equal(v, checkpoint.model[k]) for k, v in last.state_dict().items())


def test_resume_refuses_other_settings(tmp_path):
    train(small(), task(), steps=2, out=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="'lr' must be 0.01 to resume .* got 0.02"):
        train(small(), task(), steps=4, out=tmp_path, resume=True, **{**SETTINGS, "lr": 0.02})
    with pytest.raises(ValueError, match="'seed' must be 0 to resume"):
        train(small(), task(), steps=4, out=tmp_path, resume=True, seed=1, **SETTINGS)
    with pytest.raises(ValueError, match="'steps' must be at least the 2 updates done before, got 1"):
        train(small(), task(), steps=1, out=tmp_path, resume=True, **SETTINGS)
    with pytest.raises(ValueError, match="got no such file"):
        train(small(), task(), steps=4, out=tmp_path / "none", resume=True, **SETTINGS)


@pytest.mark.parametrize(
    "spoil, what",
    [
        (lambda loss: loss * math.nan, "loss became nan"),
        (lambda loss: loss + math.inf, "loss became inf"),
        (lambda loss: loss + (loss - loss).sqrt(), "gradient norm became nan"),
    ],
)
def test_divergence_is_told_and_the_checkpoint_kept(tmp_path, monkeypatch, spoil, what):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    model = small()
    with pytest.raises(Diverged, match=rf"{what} at update 6 \(sequence 30\); the last checkpoint is kept at .*safetensors"):
        train(model, Meddling(task(), 6, spoil=spoil), steps=10, out=tmp_path, **SETTINGS)
    assert all(p.isfinite().all() for p in model.parameters())
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").meta["train"]["step"] == 4
    with pytest.raises(Diverged, match="no checkpoint was written yet"):
        train(small(), Meddling(task(), 6, spoil=spoil), steps=10, **SETTINGS)


def test_it_stops_at_the_loss_or_the_time_asked_for():
    result = train(small(), task(), steps=40, until=1e9, **SETTINGS)
    assert (result.updates, result.stopped) == (4, "until")
    result = train(small(), task(), steps=40, max_minutes=1e-9, **SETTINGS)
    assert (result.updates, result.stopped) == (1, "max_minutes")


def test_the_row_is_the_mean_of_its_updates():
    losses = []

    class Listening(Meddling):
        def loss(self, output, batch):
            loss = self.inner.loss(output, batch)
            if torch.is_grad_enabled():
                losses.append(loss.item())
            return loss

    result = train(small(), Listening(task(), 0), steps=6, **SETTINGS)
    assert [r["loss"] for r in result.curve] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2])
    assert result.curve[1].keys() == {
        "step", "sequences", "loss", "eval_loss", "bits", "wrong_bits", "sequences_wrong", "seconds"
    }  # fmt: skip
    assert result.curve[1]["sequences"] == 30


def test_clipping_bounds_what_the_optimizer_sees():
    torch.manual_seed(0)
    batch = task().sample(8, generator=torch.Generator().manual_seed(0), length=3)
    for how, bound in (("clip_norm", 0.25), ("clip_value", 0.01)):
        model = small()
        _, norm = update(model, task(), batch, torch.optim.SGD(model.parameters(), lr=0.0), **{how: bound})
        grads = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        assert norm > bound
        if how == "clip_norm":
            assert grads.norm().item() == pytest.approx(bound, rel=1e-4)
        else:
            assert grads.abs().max().item() == pytest.approx(bound, rel=1e-6)


def test_graves_rmsprop_is_the_published_recursion():
    rng = np.random.default_rng(0)
    p = rng.normal(size=7)
    param = torch.nn.Parameter(torch.tensor(p))
    optimizer = GravesRMSProp([param], lr=0.01)
    n, g, d = np.zeros(7), np.zeros(7), np.zeros(7)
    for _ in range(20):
        e = rng.normal(size=7)
        n = 0.95 * n + 0.05 * e**2
        g = 0.95 * g + 0.05 * e
        d = 0.9 * d - 0.01 * e / np.sqrt(n - g**2 + 1e-4)
        p = p + d
        param.grad = torch.tensor(e)
        optimizer.step()
    np.testing.assert_allclose(param.detach().numpy(), p, rtol=1e-12)


def test_evaluate_weighs_batches_by_their_sequences():
    class Counting:
        test_settings = {"s": {}}

        def sample(self, n, generator):
            return task().sample(n, generator=generator)

        def loss(self, output, batch):
            return torch.tensor(float(output.shape[1]))

        def metrics(self, output, batch):
            return {"n": output.shape[1] * 10.0}

    model = small().train()
    found = evaluate(model, Counting(), sequences=7, batch_size=3)
    assert found["s"] == pytest.approx({"loss": (3 * 3 + 3 * 3 + 1) / 7, "n": 10 * (3 * 3 + 3 * 3 + 1) / 7})
    assert model.training
    with pytest.raises(ValueError, match="'sequences' and 'batch_size' must be >= 1, got 0"):
        evaluate(model, Counting(), sequences=0)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"steps": 0}, "'steps' must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, "'batch_size' must be an integer >= 1, got 2.0"),
        ({"optimizer": "sgd"}, "'optimizer' must be one of adam, rmsprop, got 'sgd'"),
        ({"lr": 0.0}, "'lr' must be > 0 and finite, got 0.0"),
        ({"lr": math.nan}, "'lr' must be > 0 and finite, got nan"),
        ({"clip_norm": -1.0}, "'clip_norm' must be > 0 or None, got -1.0"),
        ({"schedule": "linear"}, "'schedule' must be one of constant, cosine, got 'linear'"),
        ({"resume": True}, "'out' must name the run's folder to resume it"),
    ],
)
def test_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        train(small(), task(), **{**SETTINGS, "steps": 2, **bad})
