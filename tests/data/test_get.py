import hashlib
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from data_needs import need

from memcore import data
from memcore.data import _get


def leftovers(cache):
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def test_omniglot_from_the_zip_files_of_a_mirror(zips, serve, cache, source):
    url, asked = serve(zips)
    lines = []
    path = data.get("omniglot", url + "/", log=lines.append)
    assert path == cache / "omniglot.npz" and leftovers(cache) == ["omniglot.npz"]
    assert asked == ["/images_background.zip", "/images_evaluation.zip"]
    assert lines[0] == f"downloading {url}/images_background.zip" and lines[-1] == f"{path} is ready"
    with np.load(path) as got, np.load(source) as expected:
        for key in got:
            assert np.array_equal(got[key], expected[key])
    assert data.get("omniglot", url) == path and len(asked) == 2  # it is there: no download
    assert data.omniglot().source == path


@pytest.fixture
def digits(tmp_path_factory):
    """A folder that holds the real mnist.npz."""
    path = need(data.locate, "mnist")
    if path.suffix != ".npz":
        pytest.skip(f"mnist is found as {path}, not as npz")
    folder = tmp_path_factory.mktemp("digits")
    shutil.copy(path, folder / "mnist.npz")
    return folder


def test_mnist_from_a_mirror_by_the_command(digits, serve, cache):
    url, _ = serve(digits)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-m", "memcore.data", "get", "mnist", "--url", url], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert f"downloading {url}/mnist.npz" in run.stderr and leftovers(cache) == ["mnist.npz"]
    (cache / "mnist.npz").write_bytes(b"damaged since")
    with pytest.raises(data.DataDamaged):
        data.mnist()
    data.get("mnist", url)
    assert data.mnist().y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_a_wrong_checksum_leaves_nothing(digits, serve, cache, monkeypatch):
    url, _ = serve(digits)
    monkeypatch.setitem(_get._SOURCES, "mnist", _get._SOURCES["mnist"]._replace(url=url))
    with pytest.raises(data.DataDamaged, match=r"mnist.npz has SHA256 [0-9a-f]{64}, expected 731c5ac6.*nothing was kept"):
        data.get("mnist")
    assert leftovers(cache) == []
    files = {"mnist.npz": hashlib.md5((digits / "mnist.npz").read_bytes()).hexdigest()}
    monkeypatch.setitem(_get._SOURCES, "mnist", _get._SOURCES["mnist"]._replace(files=files))
    assert data.get("mnist") == cache / "mnist.npz"


def test_wrong_pixels_leave_nothing(digits, serve, cache):
    with np.load(digits / "mnist.npz") as z:
        arrays = dict(z)
    arrays["y_test"][3] ^= 1
    np.savez(digits / "mnist.npz", **arrays)
    url, _ = serve(digits)
    with pytest.raises(data.DataDamaged, match="MD5 of y_test"):
        data.get("mnist", url)
    assert leftovers(cache) == []


@pytest.fixture
def ngt(tmp_path_factory):
    """A folder with sift-dataset-5k.tsv as its publisher packs it, made of the real vectors."""
    v = need(data.vectors)
    rows = np.column_stack([np.concatenate([v.base, v.query]), np.arange(100_001, 105_001)])
    folder = tmp_path_factory.mktemp("ngt")
    np.savetxt(folder / "sift-dataset-5k.tsv", rows, "%d", "\t")
    return folder


def test_vectors_from_the_file_of_their_publisher(ngt, serve, cache, monkeypatch):
    expected = need(data.vectors, root=ngt)  # read as it is, its neighbours worked out
    url, asked = serve(ngt)
    monkeypatch.setitem(_get._SOURCES, "sift5k", _get._SOURCES["sift5k"]._replace(url=url))  # so that the checksum counts
    path = data.get("sift5k")
    assert path == cache / "sift5k.npz" and leftovers(cache) == ["sift5k.npz"] and asked == ["/sift-dataset-5k.tsv"]
    assert data.locate("sift5k") == path and data.get("sift5k") == path and len(asked) == 1
    for a, b in zip(data.vectors(), expected, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    text = (ngt / "sift-dataset-5k.tsv").read_text()
    path.unlink()
    for wrong, message in (
        (text.replace("\t13\t", "\t14\t", 1), "sha256 is [0-9a-f]{16}..., expected 0b6b221c"),
        (text.replace("\t13\t", "\t256\t", 1), "5000 lines of 129 numbers, expected 5000 of 128 bytes"),
        (text[: text.index("\n", 1000) + 1], "lines of 129 numbers, expected 5000"),
        (text[:1000], "damaged"),
        ("<html>", "damaged"),
    ):
        (ngt / "sift-dataset-5k.tsv").write_text(wrong)
        with pytest.raises(data.DataDamaged, match="has SHA256 .*, expected 2e638d74"):
            data.get("sift5k")
        with pytest.raises(data.DataDamaged, match=message):  # from another address only the numbers decide
            data.get("sift5k", url)
    assert leftovers(cache) == []


def test_what_is_no_download_is_found_or_its_source_told(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("memcore.data._lists._SYSTEM", tmp_path / "nowhere")
    with pytest.raises(data.DataNotFound, match="words is no download and was not found; apt-get install wamerican-huge .*or put words.txt.* into"):
        data.get("words")
    assert data.main(["get", "words"]) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="'url' must be left out for words, which is no download, got 'http://x'"):
        data.get("words", "http://x")
    cache.mkdir(parents=True)
    (cache / "words.txt").write_text("one\ntwo\n")
    lines = []
    assert data.get("words", log=lines.append) == cache / "words.txt" == data.locate("words")
    assert lines == [f"{cache / 'words.txt'} is there and whole"]
    (cache / "words.txt").write_text("one\none\n")
    with pytest.raises(data.DataDamaged, match="1 repeated strings"):
        data.get("words")


def test_every_loader_is_listed_by_name(cache, monkeypatch, capsys, tmp_path):
    from memcore import doctor

    monkeypatch.setattr("memcore.data._lists._SYSTEM", tmp_path / "nowhere")
    loaders = {n for n in data.__all__ if n.islower()} - {"cache_dir", "get", "locate", "main", "names"}
    assert loaders == {n if n != "sift5k" else "vectors" for n in data.names()}
    assert data.main(["list"]) == 0
    listed = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    assert tuple(name for name, _, _ in listed) == data.names() == tuple(doctor.examine()["data"])
    assert all("not found in" in where and ("data get " in where or "apt-get" in where) for _, _, where in listed)


def test_no_network(serve, cache, tmp_path, monkeypatch):
    url, _ = serve(tmp_path)
    with pytest.raises(data.DataNotFound, match=r"cannot download .*/mnist.npz \(File not found\)") as e:
        data.get("mnist", url)
    assert f"put them into {cache}" in str(e.value) and "--url" in str(e.value)
    for broken in ("http://127.0.0.1:1", "http://nowhere.invalid"):
        with pytest.raises(data.DataNotFound, match=f"cannot download {broken}/images_background.zip"):
            data.get("omniglot", broken)
    assert leftovers(cache) == []


def test_a_cut_connection(cache, monkeypatch):
    class Cut(io.BytesIO):
        headers = {"Content-Length": "1000"}

    monkeypatch.setattr(_get.urllib.request, "urlopen", lambda *a, **k: Cut(b"half"))
    with pytest.raises(data.DataNotFound, match="ended after 4 of 1000 bytes"):
        data.get("mnist")
    assert leftovers(cache) == []


def test_arguments_are_checked(cache, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="'name' must be one of omniglot, mnist, sift5k, words, got 'imagenet'"):
        data.get("imagenet")
    with pytest.raises(ValueError, match="'name' must be one of omniglot, mnist, sift5k, words, got 'imagenet'"):
        data.locate("imagenet")
    with pytest.raises(ValueError, match="'url' must start with http:// or https://, got 'file:///etc'"):
        data.get("mnist", "file:///etc")
    assert data.main(["get", "imagenet"]) == 2 and data.main([]) == 2 and data.main(["--help"]) == 0
    capsys.readouterr()
    assert data.main(["get", "mnist", "--url", "ftp://x"]) == 2
    error = "memcore: error: memcore.data.get: 'url' must start with http:// or https://, got 'ftp://x'\n"
    assert capsys.readouterr().err == error
    assert data.main(["list"]) == 0
    assert capsys.readouterr().out.startswith("omniglot: not found in ")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write into the cache .*set XDG_CACHE_HOME"):
        data.get("mnist", "http://127.0.0.1:1")
