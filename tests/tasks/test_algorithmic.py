import math

import numpy as np
import pytest
import torch

from memcore import tasks

ALGORITHMIC = ["copy", "repeat-copy", "associative-recall", "dynamic-ngrams", "priority-sort", "priority-sort-small"]
RAGGED = ["copy", "repeat-copy", "associative-recall"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(t):
    return t.int().tolist()


@pytest.mark.parametrize("name", ALGORITHMIC)
def test_sizes_seeds_and_the_global_generator(name):
    task = tasks.make(name)
    assert task.name == name
    batch, again, other = (task.sample(7, generator=seeded(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(batch, again) if a is not None)
    assert batch.input.shape != other.input.shape or not torch.equal(batch.input, other.input)
    steps = len(batch.input)
    assert batch.input.shape == (steps, 7, task.input_size) and batch.input.dtype == torch.float32
    assert batch.target.shape == (steps, 7, task.output_size) and batch.target.dtype == torch.float32
    assert batch.mask.shape == (steps, 7) and set(batch.mask.unique().tolist()) <= {0.0, 1.0}
    assert batch.lengths is None
    assert batch.target[batch.mask == 0].eq(0).all()
    before = torch.get_rng_state()
    task.sample(3, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)  # a given generator is the only one used
    task.sample(3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_copy_by_hand():
    batch = tasks.make("copy").sample(5, generator=seeded(), length=3)
    assert batch.input.shape == (7, 5, 9) and batch.target.shape == (7, 5, 8)
    for b in range(5):
        x, y = batch.input[:, b], batch.target[:, b]
        assert rows(x[:, 8]) == [0, 0, 0, 1, 0, 0, 0]
        assert x[3:, :8].eq(0).all()  # nothing but the delimiter while the answer is due
        assert torch.equal(y[4:], x[:3, :8])
        assert rows(batch.mask[:, b]) == [0, 0, 0, 0, 1, 1, 1]
    assert set(batch.input.unique().tolist()) == {0.0, 1.0}


def test_repeat_copy_by_hand():
    batch = tasks.make("repeat-copy").sample(4, generator=seeded(), length=2, repeats=3)
    assert batch.input.shape == (2 + 1 + 6 + 1, 4, 9)
    for b in range(4):
        x, y = batch.input[:, b], batch.target[:, b]
        assert x[2, 8].item() == pytest.approx((3 - 5.5) / math.sqrt(8.25))
        assert x[[0, 1], 8].eq(0).all() and x[3:].eq(0).all() and x[2, :8].eq(0).all()
        assert torch.equal(y[3:9, :8], x[:2, :8].repeat(3, 1))
        assert rows(y[:, 8]) == [0] * 9 + [1] and y[9, :8].eq(0).all()
        assert rows(batch.mask[:, b]) == [0] * 3 + [1] * 7


def test_repeat_count_has_mean_0_and_variance_1():
    task = tasks.make("repeat-copy", max_repeats=10)
    counts = [task.sample(1, generator=seeded(), length=1, repeats=r).input[1, 0, 8].item() for r in range(1, 11)]
    assert abs(sum(counts)) < 1e-5 and sum(c * c for c in counts) / 10 == pytest.approx(1)
    far = task.sample(1, generator=seeded(), length=1, repeats=20).input[1, 0, 8].item()
    assert far == pytest.approx(14.5 / math.sqrt(8.25))


def test_blank_vectors_of_repeat_copy_come_in_training_alone():
    plain, task = tasks.make("repeat-copy"), tasks.make("repeat-copy", blank=0.25)

    def empty(batch):
        return batch.input[:10, :, :8].eq(0).all(-1).float().mean().item()

    batch = task.sample(2000, generator=seeded(), length=10, repeats=1)
    assert empty(batch) == pytest.approx(0.25 + 0.75 / 256, abs=0.012)
    assert torch.equal(batch.target[11:21, :, :8], batch.input[:10, :, :8])
    for setting in task.test_settings.values():
        assert torch.equal(task.sample(50, generator=seeded(), **setting).input, plain.sample(50, generator=seeded(), **setting).input)
    for wrong, error in ((1.5, ValueError), (float("nan"), ValueError), ("a", TypeError), (True, TypeError)):
        with pytest.raises(error, match="'blank' must"):
            tasks.make("repeat-copy", blank=wrong)


def test_associative_recall_by_hand():
    batch = tasks.make("associative-recall").sample(64, generator=seeded(), items=3)
    assert batch.input.shape == (3 * 4 + 5 + 3, 64, 8)
    asked = set()
    for b in range(64):
        x, y = batch.input[:, b], batch.target[:, b]
        assert rows(x[:, 6]) == [1, 0, 0, 0] * 3 + [0] * 8
        assert rows(x[:, 7]) == [0] * 12 + [1, 0, 0, 0, 1] + [0] * 3
        assert x[[0, 4, 8, 12, 16], :6].eq(0).all() and x[17:].eq(0).all()
        items = [x[1 + 4 * i : 4 + 4 * i, :6] for i in range(3)]
        query = next(i for i in range(3) if torch.equal(items[i], x[13:16, :6]))
        assert query < 2  # never the last
        asked.add(query)
        assert torch.equal(y[17:], items[query + 1])
        assert rows(batch.mask[:, b]) == [0] * 17 + [1] * 3
    assert asked == {0, 1}


def test_priority_sort_by_hand():
    for name, items, answers, bits in (("priority-sort", 20, 16, 8), ("priority-sort-small", 8, 6, 6)):
        batch = tasks.make(name).sample(3, generator=seeded())
        assert batch.input.shape == (items + answers, 3, bits + 1)
        for b in range(3):
            given = batch.input[:items, b].tolist()
            assert len({v[-1] for v in given}) == items and all(-1 <= v[-1] < 1 for v in given)
            given.sort(key=lambda v: -v[-1])
            assert batch.target[items:, b].tolist() == [v[:-1] for v in given[:answers]]
            assert batch.input[items:, b].eq(0).all()
            assert rows(batch.mask[:, b]) == [0] * items + [1] * answers


def test_training_distribution():
    copy = tasks.make("copy")
    g = seeded()
    lengths = [(len(copy.sample(1, generator=g).input) - 1) // 2 for _ in range(400)]
    assert set(lengths) == set(range(1, 21))
    ragged = copy.sample(2000, generator=g, ragged=True)
    n = (ragged.lengths - 1) // 2
    assert n.min() == 1 and n.max() == 20 and abs(n.float().mean() - 10.5) < 0.6
    bits = copy.sample(2000, generator=g, length=5).target[6:]
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / math.sqrt(bits.numel())
    recall = tasks.make("associative-recall")
    assert {len(recall.sample(1, generator=g).input) for _ in range(100)} == {4 * k + 8 for k in range(2, 7)}
    repeat = tasks.make("repeat-copy").sample(2000, generator=g, ragged=True)
    counts = repeat.input[..., 8].sum(0)
    assert abs(counts.mean()) < 0.1 and abs(counts.var() - 1) < 0.1
    priorities = tasks.make("priority-sort").sample(500, generator=g).input[:20, :, 8]
    assert abs(priorities.mean()) < 0.03 and abs(priorities.var() - 1 / 3) < 0.02


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_items_equal_each_alone(name):
    task = tasks.make(name)
    batch = task.sample(12, generator=seeded(), ragged=True)
    assert batch.lengths.dtype == torch.int64 and len(batch.input) == batch.lengths.max() > batch.lengths.min()
    for b, length in enumerate(batch.lengths.tolist()):
        for t in batch[:3]:
            assert t[length:, b].eq(0).all()
        assert batch.mask[length - 1, b] == 1  # the last step of an item is an answer
    output = torch.randn(*batch.target.shape)
    alone = [
        task.loss(output[:n, [b]], tasks.Batch(*(t[:n, [b]] for t in batch[:3]))) for b, n in enumerate(batch.lengths)
    ]
    assert task.loss(output, batch).item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


def test_ngrams_shift_their_target():
    batch = tasks.make("dynamic-ngrams").sample(9, generator=seeded())
    assert batch.input.shape == batch.target.shape == (200, 9, 1) and batch.mask.eq(1).all()
    assert torch.equal(batch.input[1:], batch.target[:-1]) and batch.input[0].eq(0).all()
    assert tasks.make("dynamic-ngrams", length=50).sample(2, generator=seeded()).target.shape == (50, 2, 1)


def counted(bits):
    """Cost of the counting estimator, one bit after the other."""
    cost, seen = 0.0, {}
    for t in range(5, len(bits)):
        n = seen.setdefault(tuple(bits[t - 5 : t]), [0, 0])
        cost -= math.log2((n[bits[t]] + 0.5) / (n[0] + n[1] + 1))
        n[bits[t]] += 1
    return cost


def test_ngram_optimum_against_a_loop():
    batch = tasks.make("dynamic-ngrams").sample(6, generator=seeded())
    found = tasks.ngram_optimum(batch)
    assert found.dtype == torch.float64
    expected = [counted(batch.target[:, b, 0].int().tolist()) for b in range(6)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    ones = tasks.Batch(*(torch.ones(200, 1, 1),) * 2, torch.ones(200, 1))
    assert tasks.ngram_optimum(ones).item() == pytest.approx(counted([1] * 200))


def test_ngram_optimum_has_its_published_value():
    """127.98 +- 0.25 bits of the 195; and our bits have the cost of bits drawn one by one by another generator."""
    task, g = tasks.make("dynamic-ngrams"), seeded()
    costs = torch.cat([tasks.ngram_optimum(task.sample(100, generator=g)) for _ in range(120)])
    error = costs.std().item() / math.sqrt(len(costs))
    assert abs(costs.mean().item() - 127.98) < 0.25 + 2 * error
    assert task.optimum == pytest.approx(costs.mean().item() + 5, abs=3 * error)

    rng, n = np.random.default_rng(0), 12_000
    table = rng.beta(0.5, 0.5, (n, 32))
    bits = rng.integers(0, 2, (200, n))
    known = np.zeros(n)
    for t in range(5, 200):
        p = table[np.arange(n), (bits[t - 5 : t].T @ [16, 8, 4, 2, 1])]
        bits[t] = rng.random(n) < p
        known -= np.log2(np.where(bits[t], p, 1 - p))
    assert abs(known.mean() - 98.28) < 0.25 + 3 * known.std() / math.sqrt(n)
    other = torch.cat(
        [tasks.ngram_optimum(tasks.Batch(None, torch.from_numpy(b)[..., None], None)) for b in np.split(bits, 12, axis=1)]
    )
    assert abs(other.mean() - costs.mean()) < 4 * error * math.sqrt(2)
    assert abs(other.std() / costs.std() - 1) < 0.05


@pytest.mark.parametrize("name", ALGORITHMIC)
def test_loss_is_bits_per_sequence(name):
    task = tasks.make(name)
    batch = task.sample(3, generator=seeded())
    logits = torch.randn(*batch.target.shape, dtype=torch.float64, requires_grad=True)
    p, y = 1 / (1 + np.exp(-logits.detach().numpy())), batch.target.numpy()
    cost = -(y * np.log2(p) + (1 - y) * np.log2(1 - p)) * batch.mask.numpy()[..., None]
    loss = task.loss(logits, batch)
    assert loss.item() == pytest.approx(cost.sum() / 3, rel=1e-6)
    loss.backward()
    assert logits.grad[batch.mask == 0].eq(0).all()
    assert task.loss(logits.detach().bfloat16(), batch).dtype == torch.float32


def test_guessing_costs_what_guess_says():
    copy, g = tasks.make("copy"), seeded()
    batch = copy.sample(4, generator=g, length=7)
    assert copy.loss(torch.zeros(15, 4, 8), batch).item() == pytest.approx(56)
    assert copy.guess == 84 and tasks.make("repeat-copy").guess == 242 and tasks.make("associative-recall").guess == 18
    for name in ("associative-recall", "dynamic-ngrams", "priority-sort", "priority-sort-small"):
        task = tasks.make(name)
        batch = task.sample(4, generator=g)
        assert task.loss(torch.zeros(*batch.target.shape), batch).item() == pytest.approx(task.guess)


def test_metrics():
    task = tasks.make("copy")
    batch = task.sample(4, generator=seeded(), length=5)
    right = (batch.target - 0.5) * 40
    assert task.metrics(right, batch) == {"bits": pytest.approx(0, abs=1e-4), "wrong_bits": 0.0, "sequences_wrong": 0.0}
    wrong = right.clone()
    wrong[6, 1, 3] *= -1
    wrong[8, 1, 0] *= -1
    wrong[10, 3, 7] *= -1
    wrong[0, 0, 0] *= -1  # not in the answer phase
    found = task.metrics(wrong, batch)
    assert found["wrong_bits"] == pytest.approx(3 / (5 * 8 * 4)) and found["sequences_wrong"] == 0.5
    assert found["bits"] == pytest.approx(3 * 20 / math.log(2) / 4, rel=1e-4)
    grams = tasks.make("dynamic-ngrams")
    batch = grams.sample(5, generator=seeded())
    found = grams.metrics(torch.zeros(200, 5, 1), batch)
    assert found["bits_over_optimum"] == pytest.approx(195 - tasks.ngram_optimum(batch).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ALGORITHMIC)
def test_test_settings_are_overrides(name):
    task = tasks.make(name)
    for overrides in task.test_settings.values():
        batch = task.sample(1, generator=seeded(), **overrides)
        assert batch.mask.sum() > 0
    assert task.defaults["cpu"]["batch_size"] in range(16, 33) and task.defaults["paper"]["batch_size"] == 1
    lengths = {
        "copy": {"10", "20", "30", "40", "50", "80", "120"},
        "repeat-copy": {"in range", "T=20,R=10", "T=10,R=20"},
        "associative-recall": {"6", "10", "12", "15", "20"},
    }
    assert set(task.test_settings) >= lengths.get(name, set())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tasks.make("sudoku"), ValueError, "tasks.make: unknown task 'sudoku'; known: copy, repeat-copy,"),
        (lambda: tasks.make("copy", lenght=3), ValueError, "tasks.copy: unknown option 'lenght'; known: bits, min_length"),
        (lambda: tasks.make("priority-sort-small", itens=3), ValueError, "unknown option 'itens'; known: items, answers, bits"),
        (lambda: tasks.make("copy", bits=0), ValueError, "tasks.copy: 'bits' must be at least 1, got 0"),
        (lambda: tasks.make("copy", bits=8.0), TypeError, "tasks.copy: 'bits' must be an int, got float"),
        (lambda: tasks.make("copy", min_length=5, max_length=4), ValueError, "'max_length' must be at least 5, got 4"),
        (lambda: tasks.make("repeat-copy", max_repeats=1), ValueError, "'max_repeats' must be at least 2, got 1"),
        (lambda: tasks.make("associative-recall", min_items=1), ValueError, "'min_items' must be at least 2, got 1"),
        (lambda: tasks.make("dynamic-ngrams", length=5), ValueError, "'length' must be at least 6, got 5"),
        (lambda: tasks.make("priority-sort", answers=21), ValueError, r"'answers' must be at most 'items' \(20\), got 21"),
        (lambda: tasks.make("copy").sample(0), ValueError, "tasks.copy: 'batch_size' must be at least 1, got 0"),
        (lambda: tasks.make("copy").sample(1, length=0), ValueError, "tasks.copy: 'length' must be at least 1, got 0"),
        (lambda: tasks.make("copy").sample(1, size=4), ValueError, "unknown override 'size'; known: length, ragged"),
        (lambda: tasks.make("dynamic-ngrams").sample(1, length=4), ValueError, "unknown override 'length'; known: none"),
        (lambda: tasks.make("copy").sample(1, generator=3), TypeError, "'generator' must be a CPU torch.Generator or None"),
        (lambda: tasks.make("associative-recall").sample(1, items=1), ValueError, "'items' must be at least 2, got 1"),
        (
            lambda: tasks.make("copy").loss(torch.zeros(3, 1, 9), tasks.make("copy").sample(1, length=1)),
            ValueError,
            r"'output' must have shape \(T, B, O\) = \(3, 1, 8\), got \(3, 1, 9\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
