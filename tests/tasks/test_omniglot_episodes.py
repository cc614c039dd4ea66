import math

import numpy as np
import pytest
import torch
from data_needs import need

from memcore import tasks


def make(**options):
    return need(tasks.make, "omniglot", **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def found(task, image):
    """(character, drawing) of an upright, unmoved image."""
    pixels = (image.reshape(task.size, task.size) * 255).round().byte().numpy()
    hit = np.flatnonzero((task.drawings.images.reshape(-1, task.size, task.size) == pixels).all((1, 2)))
    return {(i // 20, i % 20) for i in hit.tolist()}


def test_test_episodes_by_hand():
    """What each step shows is the drawing of an unseen character; labels, their shift, and the counts are as told."""
    task = make()
    batch = task.sample(3, generator=seeded(), part="test")
    assert batch.input.shape == (50, 3, 405) and batch.input.dtype == torch.float32
    assert batch.target.shape == (50, 3) and batch.target.dtype == torch.int64
    assert batch.mask.eq(1).all() and batch.lengths is None
    test = set(task.drawings.test.tolist())
    for b in range(3):
        target = batch.target[:, b]
        assert torch.bincount(target).tolist() == [10] * 5
        previous = torch.nn.functional.one_hot(target, 5).float()
        assert batch.input[0, b, 400:].eq(0).all() and torch.equal(batch.input[1:, b, 400:], previous[:-1])
        seen, of_label = set(), {}
        for t in range(50):
            places = found(task, batch.input[t, b, :400])
            assert places and {c for c, _ in places} <= test
            (place,) = places
            assert place not in seen  # each drawing once
            seen.add(place)
            of_label.setdefault(target[t].item(), set()).add(place[0])
        assert all(len(c) == 1 for c in of_label.values()) and len(set.union(*of_label.values())) == 5
        assert target.tolist() != sorted(target.tolist())


def test_training_and_test_characters_are_disjoint():
    for options in ({}, {"split": "lake"}, {"split": "random", "seed": 1}):
        task = make(rotations=False, shift=0, angle=0, **options)
        train, test = set(task.drawings.train.tolist()), set(task.drawings.test.tolist())
        assert not train & test and len(train | test) == 1623
        batch = task.sample(1, generator=seeded())
        for t in range(0, 50, 7):
            assert {c for c, _ in found(task, batch.input[t, 0, :400])} <= train


def test_draws_are_fixed_by_the_generator():
    for options in ({}, {"labels": "string"}):
        task = make(**options)
        for part in ("train", "test"):
            one, same, other = (task.sample(4, generator=seeded(s), part=part) for s in (5, 5, 6))
            assert torch.equal(one.input, same.input) and torch.equal(one.target, same.target)
            assert not torch.equal(one.target, other.target)


def test_labels_tell_nothing():
    """The label of a character is uniform over episodes, and the first step's image does not hold its label."""
    task = make(classes=3, shots=1, rotations=False, shift=0, angle=0)
    task._bank["train", 20] = task._images("train", 20)[:3]  # three characters only, so that each is in every episode
    batch = task.sample(3000, generator=seeded())
    first = batch.input[0, :, :400]
    ink = first.sum(1)
    drawings = task._images("train", 20).float().div(255).flatten(2).sum(2)  # [3, 20]
    for character in range(3):
        shown = torch.isclose(ink[:, None], drawings[character], atol=1e-3).any(1)
        share = torch.bincount(batch.target[0][shown], minlength=3) / shown.sum()
        assert shown.sum() > 300 and (share - 1 / 3).abs().max() < 4 * 0.48 / math.sqrt(shown.sum())


def test_rotations_are_whole_classes():
    """Without small shifts and turns a training drawing is a known drawing turned by a quarter, the same in all its class."""
    task = make(shift=0, angle=0)
    batch = task.sample(2, generator=seeded())
    bank = torch.from_numpy(task.drawings.images[task.drawings.train]).float().div(255).flatten(0, 1)
    turned = torch.stack([torch.rot90(bank, k, (1, 2)) for k in range(4)]).flatten(2)  # [4, n, 400]
    turned = turned - turned.mean(-1, keepdim=True)
    turned /= turned.norm(dim=-1, keepdim=True)
    quarters = set()
    for b in range(2):
        for label in range(5):
            x = batch.input[batch.target[:, b] == label, b, :400]
            x = (x - x.mean(1, keepdim=True)) / (x - x.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
            likeness, best = (x @ turned.flatten(0, 1).T).max(1)
            assert likeness.min() > 0.95
            quarter, character = best // len(bank), best % len(bank) // 20
            assert len(character.unique()) == 1
            assert len(quarter.unique()) == 1
            quarters.add(quarter[0].item())
    assert len(quarters) > 1


def test_moves_are_small_and_keep_the_contrast():
    task, plain = make(rotations=False), make(rotations=False, shift=0, angle=0)
    moved, still = (t.sample(64, generator=seeded()).input[..., :400].reshape(-1, 20, 20) for t in (task, plain))
    assert abs(moved.std() / still.std() - 1) < 0.03 and abs(moved.mean() / still.mean() - 1) < 0.04
    assert moved.min() >= 0 and moved.max() <= 1 + 1e-5
    at = torch.arange(20.0)

    def centre(x):
        mass = x.sum((1, 2))
        return torch.stack([(x.sum(2) @ at) / mass, (x.sum(1) @ at) / mass])

    offset = centre(moved) - centre(still)  # the same drawings in the same order
    assert offset.abs().max() < 5.5 and 1.2 < offset.std() < 2.2  # U(-3, 3) has 1.73; the turn moves a centre too


def test_string_labels():
    task = make(labels="string", classes=15)
    assert (task.input_size, task.output_size, task.steps) == (425, 25, 100)
    batch = task.sample(4, generator=seeded(), part="test")
    assert batch.input.shape == (100, 4, 425) and batch.target.shape == (100, 4, 5)
    code = torch.nn.functional.one_hot(batch.target, 5).flatten(2).float()
    assert batch.input[0, :, 400:].eq(0).all() and torch.equal(batch.input[1:, :, 400:], code[:-1])
    for b in range(4):
        assert len(batch.target[:, b].unique(dim=0)) == 15  # a string of its own for each class
    perfect = task.metrics(50 * code, batch)
    assert perfect["accuracy_all"] == 1 and perfect["nats"] == pytest.approx(0, abs=1e-6)
    one_letter_off = 50 * code
    one_letter_off[..., :5] = one_letter_off[..., :5].roll(1, -1)
    assert task.metrics(one_letter_off, batch)["accuracy_all"] == 0
    assert task.guess == pytest.approx(500 * math.log(5))
    assert task.loss(torch.zeros(100, 4, 25), batch).item() == pytest.approx(task.guess, rel=1e-5)


def test_loss_and_accuracy_by_instance():
    task = make(classes=2, shots=3)
    target = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1], [1, 1], [1, 0]])
    batch = tasks.Batch(torch.zeros(6, 2, 402), target, torch.ones(6, 2))
    instance = torch.tensor([[1, 1], [2, 1], [1, 2], [3, 2], [2, 3], [3, 3]])
    answer = torch.where(instance == 1, 1 - target, target)  # wrong on the first, right afterwards
    answer[5, 1] = 1 - answer[5, 1]  # and once on a third
    logits = 30.0 * torch.nn.functional.one_hot(answer, 2)
    found = task.metrics(logits, batch)
    assert found["accuracy"] == [0.0, 1.0, 0.75] and found["accuracy_all"] == pytest.approx(7 / 12)
    assert found["nats"] == pytest.approx(5 * 30 / 2)
    x = torch.randn(6, 2, 2, dtype=torch.float64)
    cost = sum(-torch.log_softmax(x[t, b], 0)[target[t, b]] for t in range(6) for b in range(2)) / 2
    assert task.loss(x, batch).item() == pytest.approx(cost.item())


def test_no_answer_beats_the_ceiling_of_the_first_instance():
    """Who knows which steps show a new class, and guesses among the labels not yet used, is right in 45.7 %."""
    task = make()
    assert task.first_instance_ceiling == pytest.approx(0.4567, abs=1e-4)
    assert make(labels="string").first_instance_ceiling == pytest.approx(1 / 3123, rel=1e-3)
    batch = task.sample(2000, generator=seeded(), part="test")
    logits = torch.zeros(50, 2000, 5)
    used = torch.zeros(2000, 5)
    for t in range(50):
        logits[t] = -used + 1e-3 * torch.rand(2000, 5, generator=seeded(t))
        used.scatter_(1, batch.target[t][:, None], 1.0)
    first = task.metrics(logits, batch)["accuracy"][0]
    assert abs(first - task.first_instance_ceiling) < 4 * 0.5 / math.sqrt(10_000)


def test_what_is_described_and_set():
    task = make(classes=3, shots=5)
    assert task.steps == 15 and task.defaults["mann"]["slot_width"] == 40 and task.defaults["lstm"]["hidden_size"] == 200
    assert "3 classes x 5 drawings, 15 steps, onehot labels, split vinyals" in task.describe()
    assert "1200 / 423 characters" in task.describe()
    for overrides in task.test_settings.values():
        assert task.sample(1, **overrides).input.shape == (15, 1, 403)
    assert make(split="random", seed=9).describe().count("seed 9") == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": 1}, ValueError, "tasks.omniglot: 'classes' must be at least 2, got 1"),
        ({"classes": 424}, ValueError, "'classes' must be at most 423, got 424"),
        ({"shots": 21}, ValueError, "'shots' must be at most 20, the drawings of a character, got 21"),
        ({"steps": 51}, ValueError, "'steps' must be at most classes x shots = 50, got 51"),
        ({"labels": "words"}, ValueError, "'labels' must be 'onehot' or 'string', got 'words'"),
        ({"shift": -1}, ValueError, "'shift' must be at least 0, got -1"),
        ({"angle": "wide"}, TypeError, "'angle' must be a number, got str"),
        ({"way": 5}, ValueError, "tasks.omniglot: unknown option 'way'; known: classes, shots"),
        ({"split": "half"}, ValueError, "'split' must be 'vinyals', 'lake' or 'random', got 'half'"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_errors_of_sample_and_without_data(tmp_path):
    with pytest.raises(ValueError, match="'part' must be 'train' or 'test', got 'all'"):
        make().sample(1, part="all")
    with pytest.raises(ValueError, match=r"'output' must have shape \(T, B, O\) = \(50, 1, 5\), got \(50, 1, 4\)"):
        make().loss(torch.zeros(50, 1, 4), make().sample(1))
    with pytest.raises(FileNotFoundError, match="memcore.data.omniglot: not found in .* get it with"):
        tasks.make("omniglot", root=tmp_path)
