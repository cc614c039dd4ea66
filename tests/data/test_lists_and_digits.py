import gzip
import hashlib
import struct

import numpy as np
import pytest
from data_needs import need

from memcore import data


@pytest.fixture(scope="module")
def digits():
    return need(data.mnist)


def test_mnist(digits):
    assert [a.shape for a in digits] == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
    assert digits.y_train[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert hashlib.sha256(digits.x_test.tobytes()).hexdigest()[:12] == "6d87418db22c"
    assert np.bincount(digits.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def idx(array):
    return struct.pack(">4B", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def test_mnist_idx_files_give_the_same_arrays(digits, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name, array in zip(names, digits, strict=True):
        if "labels" in name:  # torchvision leaves both; plain and gzipped mix
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array), 1))
        else:
            (raw / name).write_bytes(idx(array))
    assert all(np.array_equal(a, b) for a, b in zip(data.mnist(tmp_path), digits, strict=True))
    (raw / names[3]).write_bytes(idx(digits.y_test ^ 1))
    with pytest.raises(data.DataDamaged, match="MD5 of y_test is .* expected 27ae3e4e"):
        data.mnist(tmp_path)
    (raw / names[3]).write_bytes(b"\0\0")
    with pytest.raises(data.DataDamaged, match="no IDX file"):
        data.mnist(tmp_path)
    (raw / names[3]).unlink()
    (raw / f"{names[3]}.gz").write_bytes(b"no gzip")
    with pytest.raises(data.DataDamaged):
        data.mnist(tmp_path)
    (raw / f"{names[3]}.gz").unlink()
    with pytest.raises(data.DataNotFound, match=f"{names[3]}.gz beside"):
        data.mnist(tmp_path)
    (tmp_path / "mnist.npz").write_bytes(b"PK\3\4 cut")
    with pytest.raises(data.DataDamaged, match="mnist.npz is damaged"):
        data.mnist(tmp_path / "mnist.npz")


def test_words():
    words = need(data.words)
    if len(words) != 348_454:
        pytest.skip("another list of words is installed")
    text = "\n".join(words) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == "ffd71db7e021907dbe4cbac17959d3504ff0594ae35c686ab7016b9a6b755fbb"
    assert max(map(len, words)) == 60


def test_words_of_any_file(tmp_path):
    text = "naïve\nkey with blanks\n\nlast"
    expected = ["naïve", "key with blanks", "", "last"]
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    assert data.words(tmp_path) == expected
    (tmp_path / "mine.gz").write_bytes(gzip.compress((text + "\n").encode()))
    assert data.words(tmp_path / "mine.gz") == expected
    for name, content, message in (
        ("twice.txt", b"a\nb\na\n", "1 repeated strings"),
        ("latin.txt", "naïve".encode("latin1"), "UnicodeDecodeError"),
        ("cut.xz", b"\xfd7zXZ\0", "damaged"),
        ("plain.gz", b"a\n", "BadGzipFile"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.DataDamaged, match=message):
            data.words(tmp_path / name)
    with pytest.raises(data.DataNotFound, match="one string a line"):
        data.words(tmp_path / "nowhere")


def test_vectors():
    v = need(data.vectors)
    assert v.base.shape == (4900, 128) and v.query.shape == (100, 128)
    exact = ((v.query[:, None, :].astype(np.int32) - v.base[None].astype(np.int32)) ** 2).sum(-1)
    nearest = np.argsort(exact, axis=1, kind="stable")[:, :100]  # ties to the lower row
    assert np.array_equal(nearest, v.neighbors)
    assert np.array_equal(np.take_along_axis(exact, nearest, 1), v.sqdist)


def test_vectors_in_other_forms(tmp_path):
    base, query = np.eye(3, 4, dtype=np.float32), np.ones((2, 4), np.float32)
    neighbors = np.array([[0, 1], [2, 0]], np.int32)

    def vecs(name, rows):
        head = np.full((len(rows), 1), rows.shape[1], np.int32)
        np.hstack([head, rows.view(np.int32)]).tofile(tmp_path / name)

    vecs("tiny_base.fvecs", base)
    vecs("tiny_query.fvecs", query)
    with pytest.raises(data.DataNotFound, match="tiny_groundtruth.ivecs beside tiny_base.fvecs"):
        data.vectors("tiny", tmp_path)
    vecs("tiny_groundtruth.ivecs", neighbors)
    found = data.vectors("tiny", tmp_path)
    assert np.array_equal(found.base, base) and np.array_equal(found.query, query)
    assert np.array_equal(found.neighbors, neighbors) and found.sqdist is None
    np.savez(tmp_path / "sift5k.npz", base=base, query=query, neighbors=neighbors)
    with pytest.raises(data.DataDamaged, match="expected 0b6b221c72379938"):
        data.vectors("sift5k", tmp_path)
    (tmp_path / "tiny_base.fvecs").write_bytes(b"")
    with pytest.raises(data.DataDamaged):
        data.vectors("tiny", tmp_path)
    with pytest.raises(data.DataNotFound, match="none.npz, none_base.fvecs"):
        data.vectors("none", tmp_path)
