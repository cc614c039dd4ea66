"""Checkpoints: exact round trips, refusals in words, an old file that survives a failed save."""

import errno
import json
import os
import random

import pytest
import torch
from torch import nn

from memcore.train import CheckpointError, load_checkpoint, save_checkpoint

safetensors = pytest.importorskip("safetensors.torch")


class Odd(nn.Module):
    """Parameters and buffers of several dtypes, a scalar, an empty one, tied weights."""

    def __init__(self, seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(3, 4, generator=g))
        self.b = nn.Parameter(torch.randn(5, generator=g).to(torch.bfloat16))
        self.tied = self.a
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("none", torch.zeros(0, 2, dtype=torch.float64))


def trained(seed: int, optimizer: type = torch.optim.Adam):
    model = Odd(seed)
    optim = optimizer(model.parameters(), lr=0.125)
    for _ in range(3):
        optim.zero_grad()
        ((model.a**2).sum() + (model.b.float() ** 2).sum()).backward()
        optim.step()
    return model, optim


@pytest.fixture
def saved(tmp_path):
    model, optim = trained(1)
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, model, optim, generator, {"note": "é", "x": 0.1})
    return path, model, optim, generator


def test_everything_comes_back_bit_for_bit(saved):
    path, model, optim, generator = saved
    torch.manual_seed(99)
    save_checkpoint(path, model, optim, generator, {"note": "é", "x": 0.1})
    expected_global, expected_data = torch.rand(2), torch.rand(2, generator=generator)
    other, other_optim = trained(2)
    other_generator = torch.Generator()
    loaded = load_checkpoint(path)
    loaded.restore(other, other_optim, other_generator)
    assert loaded.meta == {"note": "é", "x": 0.1}
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(torch.rand(2), expected_global)
    assert torch.equal(torch.rand(2, generator=other_generator), expected_data)
    a, b = optim.state_dict(), other_optim.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for i in a["state"]:
        for key in a["state"][i]:
            assert torch.equal(a["state"][i][key], b["state"][i][key]), (i, key)


def test_any_flipped_byte_is_refused(saved):
    path = saved[0]
    data = path.read_bytes()
    rng = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    for at in [0, header, len(data) - 1, *(rng.randrange(8, len(data)) for _ in range(60))]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="c.safetensors"):
            load_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    path = saved[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_checkpoint(path)


def test_foreign_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(CheckpointError, match="must be a memcore checkpoint, got no such file"):
        load_checkpoint(path)
    path.write_text("hello " * 50)
    with pytest.raises(CheckpointError, match="of another kind"):
        load_checkpoint(path)
    path.write_bytes(safetensors.save({"w": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="format None, expected 'memcore-checkpoint-1'"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_a_changed_record_is_refused(saved):
    path = saved[0]
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header["__metadata__"]["record"] = header["__metadata__"]["record"].replace('"x": 0.1', '"x": 0.2')
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
    with pytest.raises(CheckpointError, match="checksum does not match"):
        load_checkpoint(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_old_file_survives_a_failed_save(saved, monkeypatch, call):
    path, model, optim, generator = saved
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, model, optim, generator, {"note": "new"})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["c.safetensors"]


def test_another_model_is_refused_by_name(saved):
    path = saved[0]
    loaded = load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"'a' must have shape none \(absent\), got \(3, 4\)"):
        loaded.restore(nn.Linear(2, 2))
    other = Odd(0)
    other.a = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(CheckpointError, match=r"'a' must have shape \(4, 3\), got \(3, 4\)"):
        loaded.restore(other)


def test_states_that_were_not_saved_are_asked_for_in_vain(tmp_path):
    path = tmp_path / "c"
    model, optim = trained(1)
    save_checkpoint(path, model)
    loaded = load_checkpoint(path)
    loaded.restore(Odd(2))
    with pytest.raises(CheckpointError, match="no optimizer state"):
        loaded.restore(model, optim)
    with pytest.raises(CheckpointError, match="no generator state"):
        loaded.restore(model, generator=torch.Generator())
