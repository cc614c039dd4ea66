"""Files: what comes back, what is refused and in which words, and that a crash at any point loses nothing that was flushed."""

import errno
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from memcore.stores import DND, Adam, RMSProp, StoreError, _files

ROOT = Path(__file__).resolve().parents[2]
DAMAGED = "memcore.DND.load: '{}' must be a memcore store, got "


def fill(store, n=20, start=0):
    for a in range(store.dictionaries):
        store.write(torch.randn(n, store.key_width), torch.randn(n, store.value_width), torch.arange(start, start + n), dictionary=a)
    return store


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("optimizer", [None, "sgd", RMSProp(0.9), Adam((0.7, 0.9))], ids=str)
def test_save_and_load(optimizer, tmp_path, Store):
    store = fill(Store(3, 25, 4, 2, neighbours=3, kernel="softmax", delta=0.5, alpha=0.3, optimizer=optimizer, bf16=True))
    if optimizer is not None:
        store.lookup(torch.randn(5, 4)).output.sum().backward()
        store.step(0.1)
    store.clear(1)
    store.delete([3, 4], dictionary=2)
    store.save(tmp_path / "store")
    again = Store.load(tmp_path / "store")
    assert same(store, again) and again.config() == store.config()
    query = torch.randn(4, 4)
    for a, b in zip(store.lookup(query), again.lookup(query), strict=True):
        assert torch.equal(a, b)
    for each in (store, again):  # full dictionaries replace the same entries
        fill(each, 22, 100)
    store._rings.flat_keys[:], again._rings.flat_keys[:] = 0, 0  # each filled with draws of its own
    assert store.state_dict()["hashes"].equal(again.state_dict()["hashes"])


def test_damaged_truncated_and_foreign_snapshots(tmp_path):
    path = tmp_path / "store"
    with pytest.raises(StoreError, match=DAMAGED.format(path) + "no such file"):
        DND.load(path)
    fill(DND(1, 30, 4)).save(path)
    good = path.read_bytes()
    for at in (3, 40, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(StoreError, match=DAMAGED.format(path) + "a damaged|" + DAMAGED.format(path) + "a safetensors file of format"):
            DND.load(path)
        path.write_bytes(good[:at])
        with pytest.raises(StoreError, match=DAMAGED.format(path) + "a damaged or truncated file"):
            DND.load(path)
    from safetensors.torch import save_file

    save_file({"keys": torch.zeros(2)}, path)
    with pytest.raises(StoreError, match="a safetensors file of format None, expected 'memcore-store-1'"):
        DND.load(path)
    with pytest.raises(StoreError, match="a file that cannot be read"):
        DND.load(tmp_path)


class FullDisk:
    """Files of this process may not grow past a size."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_full_disk_leaves_the_old_snapshot(tmp_path):
    path = tmp_path / "store"
    store = fill(DND(1, 3000, 16), 10)
    store.save(path)
    old = path.read_bytes()
    fill(store, 2000)
    with FullDisk(50_000), pytest.raises(OSError, match="memcore.DND.save: .*store' cannot be written .*what was there before is unchanged") as e:
        store.save(path)
    assert e.value.errno == errno.EFBIG and path.read_bytes() == old and os.listdir(tmp_path) == ["store"]
    with pytest.raises(OSError, match="memcore.DND.save: .* cannot be written"):
        store.save(tmp_path / "missing" / "store")
    with pytest.raises(ValueError, match="memcore.DND.save: 'path' must be given"):
        store.save()


def test_a_full_disk_under_the_log_loses_nothing(tmp_path):
    store = DND.open(tmp_path / "s", 1, 3000, 16)
    fill(store, 10)
    store.flush()
    size = (tmp_path / "s" / "log").stat().st_size
    fill(store, 100, 1000)
    with FullDisk(size + 1000):
        for _ in range(2):
            with pytest.raises(OSError, match="memcore.DND.flush: .*in memory alone, and the next flush tries again"):
                store.flush()
            assert (tmp_path / "s" / "log").stat().st_size == size
    fill(store, 5, 5000)
    store.close()
    again = DND.open(tmp_path / "s")
    assert same(store, again) and len(again) == 115
    again.close()


def test_a_folder_is_opened_once_and_by_one(tmp_path):
    store = fill(DND.open(tmp_path / "s", 2, 30, 4))
    store.flush()
    with pytest.raises(RuntimeError, match="memcore.DND.open: .* is open in another process or store"):
        DND.open(tmp_path / "s")
    code = f"import memcore\ntry: memcore.DND.open({str(tmp_path / 's')!r})\nexcept RuntimeError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "is open in another process or store; one alone may write it" in said.stdout, said.stderr
    store.close()
    with DND.open(tmp_path / "s") as again:
        assert same(store, again)


def test_a_store_of_other_sizes_is_refused(tmp_path):
    DND.open(tmp_path / "s", 2, 30, 4).close()
    with pytest.raises(StoreError, match="memcore.DND.open: 'capacity' must be that of the store in .*, 30, got 31"):
        DND.open(tmp_path / "s", 2, 31, 4)
    with pytest.raises(StoreError, match="'optimizer' must be that of the store"):
        DND.open(tmp_path / "s", 2, 30, 4, optimizer="sgd")
    with pytest.raises(StoreError, match="holds no store yet: 'dictionaries', 'capacity' and 'key_width' must be given"):
        DND.open(tmp_path / "t")
    DND.open(tmp_path / "s", 2, 30, 4).close()
    with pytest.raises(OSError, match="memcore.DND.open: .* cannot be used"):
        DND.open(tmp_path / "no" / "s", 2, 30, 4)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="memcore.DND.open: .* cannot be used"):
        DND.open(tmp_path / "file", 2, 30, 4)


def opened(folder):
    with DND.open(folder) as store:
        return store.state_dict()["hashes"].tolist()


@pytest.fixture
def log(tmp_path):
    """A log of 30 commits of one entry each; the offset at which each ends."""
    store = DND.open(tmp_path / "s", 1, 100, 3)
    path = tmp_path / "s" / "log"
    ends = [path.stat().st_size]
    for i in range(30):
        store.write(torch.full((1, 3), float(i)), float(i), i)
        store.flush()
        ends.append(path.stat().st_size)
    store.close()
    return path, ends


def test_a_torn_tail_is_cut_at_the_last_whole_record(log):
    path, ends = log
    whole = path.read_bytes()
    for end in (ends[30] - 1, ends[29] + 1, ends[29], ends[12] + 30, ends[1] - 3):
        path.write_bytes(whole[:end])
        n = sum(e <= end for e in ends) - 1
        assert opened(path.parent) == list(range(n))
        assert path.stat().st_size == ends[n]
    for tail in (b"\0" * 5000, os.urandom(5000), whole[ends[3] : ends[4]][:-1], b"mcR\x01"):  # blocks that a crash left
        path.write_bytes(whole + tail)
        assert opened(path.parent) == list(range(30)) and path.stat().st_size == ends[30]
    for end in range(0, ends[0], 37):  # a crash at birth
        path.write_bytes(whole[:end])
        with pytest.raises(StoreError, match="holds no store yet"):
            opened(path.parent)


def test_records_of_one_commit_may_reach_the_disk_in_any_order(tmp_path):
    store = DND.open(tmp_path / "s", 1, 100, 3)
    path = tmp_path / "s" / "log"
    begin = path.stat().st_size
    for i in range(4):
        store.write(torch.full((1, 3), float(i)), float(i), i)
    store.close()
    data = bytearray(path.read_bytes())
    size = (len(data) - begin) // 4
    data[begin + 2 * size : begin + 3 * size] = b"\0" * size  # the third did not, the fourth did
    path.write_bytes(data)
    assert opened(tmp_path / "s") == [0, 1]


def test_damage_before_synced_records_is_refused_and_nothing_is_cut(log):
    path, ends = log
    whole = path.read_bytes()
    for at in (ends[0] + 2, ends[10] + 5, ends[28] + 40):
        broken = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        path.write_bytes(broken)
        with pytest.raises(StoreError, match=r"memcore.DND.open: .*log' is damaged at byte \d+, and whole records follow at byte \d+; .*truncate -s"):
            opened(path.parent)
        assert path.read_bytes() == broken
    path.write_bytes(b"another program's file, of its own format")
    with pytest.raises(StoreError, match="must be a memcore log, got a file of another kind"):
        opened(path.parent)


def test_logs_that_belong_elsewhere_are_refused(tmp_path):
    for name in "ab":
        with DND.open(tmp_path / name, 1, 10, 3) as store:
            fill(store, 4)
            store.save()
            fill(store, 2, 50)
    (tmp_path / "a" / "log").write_bytes((tmp_path / "b" / "log").read_bytes())
    with pytest.raises(StoreError, match="must be the log of snapshot.safetensors, got that of another store"):
        opened(tmp_path / "a")
    (tmp_path / "b" / "snapshot.safetensors").unlink()
    with pytest.raises(StoreError, match="goes on from change 1, and snapshot.safetensors ends at 0"):
        opened(tmp_path / "b")


def test_a_snapshot_without_its_log_and_a_log_older_than_its_snapshot(tmp_path):
    store = fill(DND.open(tmp_path / "s", 1, 30, 3))
    store.flush()
    path = tmp_path / "s" / "log"
    old = path.read_bytes()
    fill(store, 1, 60)
    store.save()
    store.close()
    path.write_bytes(old)  # the crash came between the snapshot, which holds a change that was never flushed, and the log's new start
    with DND.open(tmp_path / "s") as again:
        assert same(store, again)
        fill(again, 3, 70)
    with DND.open(tmp_path / "s") as third:
        assert same(again, third)
    path.unlink()
    with DND.open(tmp_path / "s") as fourth:
        assert same(store, fourth)


def test_the_log_commits_itself_before_it_grows_large(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_COMMIT", 10_000)
    store = DND.open(tmp_path / "s", 1, 1000, 8)
    for i in range(50):
        fill(store, 10, 10 * i)
    assert store._log._bytes < 10_000 < (tmp_path / "s" / "log").stat().st_size
    store.close()


def change(store, i):
    """The i-th change of a history."""
    a = i % 2
    if i % 5 == 4:
        store.delete(7 * i % 200, dictionary=a)
    elif i % 7 == 2 and store.counts[a]:
        at = torch.tensor([[a], [i % store.counts[a]]])
        store.values.grad = torch.sparse_coo_tensor(at, torch.ones(1, 1), store.values.shape, check_invariants=True)
        store.step(0.5)
    else:
        n = 1 + i % 3
        store.write(torch.full((n, 4), float(i)), torch.full((n,), float(i)), torch.arange(3 * i, 3 * i + n) % 200, dictionary=a)


def keep_changing(folder, start, pipe):
    store = DND.open(folder, 2, 64, 4, optimizer="sgd")
    for i in itertools.count(start):
        change(store, i)
        if i % 3 == 0:
            store.save() if i % 24 == 0 else store.flush()
            os.write(pipe, f"{i + 1}\n".encode())


@pytest.mark.parametrize("kills", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_9_loses_nothing_that_was_flushed(tmp_path, kills):
    """A writer is killed at random moments, and another goes on. Each time the folder holds the history up to some change, whole, and no
    earlier one than the writer had told of."""
    rng = random.Random(kills)
    expected, done = DND(2, 64, 4, optimizer="sgd"), 0
    for _ in range(kills):
        out, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                keep_changing(tmp_path / "s", done, pipe)
            finally:
                os._exit(1)
        os.close(pipe)
        told = os.read(out, 1)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        while part := os.read(out, 1 << 16):
            told += part
        os.close(out)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        for at_least in range(done, int(told.decode().rpartition("\n")[0].split("\n")[-1])):
            change(expected, at_least)
            done = at_least + 1
        with DND.open(tmp_path / "s") as store:
            for _ in range(4):  # a commit holds three changes
                if same(store, expected):
                    break
                change(expected, done)
                done += 1
            else:
                raise AssertionError(f"after {done} changes")


def test_python_and_compiled_tables_read_each_others_files(tmp_path):
    from stores import KINDS, kind_of_store

    for i, kind in enumerate(KINDS):
        with kind_of_store(kind) as cls, cls.open(tmp_path / "s", 1, 30, 3) as store:
            assert len(store) == 5 * i
            store.write(torch.randn(5, 3), torch.randn(5))
            store.write(store.keys[0, :1].detach().clone(), 1.0)  # met again, by the hash of its bytes
            assert len(store) == 5 * (i + 1)
