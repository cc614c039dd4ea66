import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_needs import need

from memcore import data
from memcore.data import _omniglot


@pytest.fixture(scope="session")
def omniglot():
    return need(data.omniglot)


def ink(source, drawings):
    with np.load(source) as z:
        return np.unpackbits(z["bits"][drawings], axis=1, count=105 * 105).reshape(-1, 105, 105)


def test_images_are_the_antialiased_drawings(omniglot, source):
    assert omniglot.images.shape == (1623, 20, 20, 20) and omniglot.images.dtype == np.uint8
    which = np.array([0, 1, 19, 20, 7777, 19279, 19280, 32459])
    x = torch.from_numpy(ink(source, which)).double().unsqueeze(1)
    for size in (20, 28):
        expected = F.interpolate(x, (size, size), mode="bilinear", antialias=True).squeeze(1).numpy() * 255
        got = omniglot.at(size).reshape(-1, size, size)[which]
        assert np.abs(got - expected).max() < 0.51
    assert abs(omniglot.images.mean() - 20.534) < 0.001


def test_images_are_shared_and_read_only(omniglot):
    assert data.omniglot(omniglot.source).images is omniglot.images
    with pytest.raises(ValueError, match="read-only"):
        omniglot.images[0] = 0


def test_splits(omniglot, source):
    with np.load(source) as z:
        vinyals, lake = z["char_vinyals"], z["char_evaluation"]
        names = tuple(z["alphabet_names"].tolist())
    assert np.array_equal(omniglot.test, np.flatnonzero(vinyals == 2)) and len(omniglot.test) == 423
    assert np.array_equal(omniglot.train, np.flatnonzero(vinyals < 2)) and len(omniglot.train) == 1200
    evaluation = data.omniglot(split="lake")
    assert np.array_equal(evaluation.test, np.flatnonzero(lake)) and len(evaluation.train) == 964
    drawn, again, other = (data.omniglot(split="random", seed=s) for s in (3, 3, 4))
    assert np.array_equal(drawn.test, again.test) and not np.array_equal(drawn.test, other.test)
    assert len(drawn.test) == 423 and drawn.split == "random (seed 3): 1200 / 423 characters"
    for o in (omniglot, evaluation, drawn):
        assert sorted([*o.train, *o.test]) == list(range(1623))
    assert omniglot.alphabet_names == names and omniglot.alphabet_names[omniglot.alphabet[964]] == "Angelic"


def test_options_are_checked():
    with pytest.raises(ValueError, match="'split' must be 'vinyals', 'lake' or 'random', got 'half'"):
        data.omniglot(split="half")
    for size in (0, 106, 20.0, True):
        with pytest.raises(ValueError, match="'size' must be an int from 1 to 105"):
            data.omniglot(size=size)


def test_folder_gives_the_same_bits(zips, source, tmp_path):
    characters = [0, 1, 500, 963]
    with zipfile.ZipFile(zips / "images_background.zip") as z:
        wanted = tuple(f"/{c + 1:04}_" for c in characters)
        z.extractall(tmp_path, [n for n in z.namelist() if any(w in n for w in wanted)])
    (tmp_path / "images_background" / "notes.txt").write_text("no drawing")
    index, bits, homes = _omniglot.read_bits(tmp_path / "images_background")
    order = np.argsort(index)
    expected = np.concatenate([np.arange(20) + 20 * c for c in characters])
    assert np.array_equal(index[order], expected)
    with np.load(source) as z:
        assert np.array_equal(bits[order], z["bits"][expected])
        assert homes == {c: z["alphabet_names"][z["char_alphabet"][c]] for c in characters}
    with pytest.raises(data.DataNotFound, match="images_evaluation beside images_background"):
        data.omniglot(tmp_path)
    (tmp_path / "images_evaluation").mkdir()
    with pytest.raises(data.DataDamaged, match="80 of 32460 drawings"):
        data.omniglot(tmp_path)


def test_damage_is_told(source, zips, tmp_path):
    whole = source.read_bytes()
    (tmp_path / "omniglot.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.DataDamaged, match="omniglot.npz is damaged"):
        data.omniglot(tmp_path)
    with np.load(source) as z:
        arrays = {k: z[k] for k in ("bits", "char_alphabet", "alphabet_names")}
    arrays["bits"][5, 700] ^= 16
    np.savez(tmp_path / "omniglot.npz", **arrays)
    with pytest.raises(data.DataDamaged, match="sha256 of the drawings is .*expected 36fc02a2da7b"):
        data.omniglot(tmp_path)
    del arrays["bits"]
    np.savez(tmp_path / "omniglot.npz", **arrays)
    with pytest.raises(data.DataDamaged, match="bits"):
        data.omniglot(tmp_path)
    (tmp_path / "omniglot.npz").unlink()
    shutil.copy(zips / "images_evaluation.zip", tmp_path)
    (tmp_path / "images_background.zip").write_bytes(b"no zip")
    with pytest.raises(data.DataDamaged, match="images_background.zip is damaged"):
        data.omniglot(tmp_path)


def test_search_order(source, tmp_path, cache, monkeypatch):
    with pytest.raises(data.DataNotFound, match="not found in .*memcore.*get it with: python -m memcore.data get omniglot"):
        data.omniglot()
    with pytest.raises(FileNotFoundError):
        data.locate("omniglot")
    for folder in (cache, tmp_path / "env", tmp_path / "root"):
        folder.mkdir(parents=True)
        (folder / "omniglot.npz").symlink_to(source)
    assert data.locate("omniglot") == cache / "omniglot.npz"
    monkeypatch.setenv("MEMCORE_DATA", str(tmp_path / "env"))
    assert data.locate("omniglot") == tmp_path / "env" / "omniglot.npz"
    assert data.locate("omniglot", tmp_path / "root") == tmp_path / "root" / "omniglot.npz"
    assert data.locate("omniglot", tmp_path / "root" / "omniglot.npz").parent == tmp_path / "root"
    with pytest.raises(data.DataNotFound):  # a root that lacks the data is not passed over in silence
        data.omniglot(tmp_path / "nowhere")
    (tmp_path / "torchvision" / "omniglot-py").mkdir(parents=True)
    for part in ("background", "evaluation"):
        (tmp_path / "torchvision" / "omniglot-py" / f"images_{part}.zip").touch()
    assert data.locate("omniglot", tmp_path / "torchvision").name == "images_background.zip"
