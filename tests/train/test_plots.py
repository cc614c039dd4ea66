"""Figures: their axes show the numbers of the runs, the files are images, bad runs are refused."""

import json

import numpy as np
import pytest
import torch

from memcore.tasks import make
from memcore.train import build, configure, plots, train
from memcore.train.checkpoint import load_checkpoint

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


def folder(path, seed=0, lr=1e-2, model="ntm", steps=4):
    tiny = {"memory_slots": 6, "slot_width": 4, "controller_size": 5} if model == "ntm" else {"hidden_size": 4, "num_layers": 1}
    config = configure(
        model, "copy", task_options={"bits": 2, "max_length": 3}, model_options=tiny, seed=seed, lr=lr, steps=steps, eval_every=2
    )
    train(*build(config), out=path, meta=config, **config["train"])
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    return [folder(top / "a"), folder(top / "b", seed=1), folder(top / "c", model="lstm", steps=6)]


def column(run, key):
    return [json.loads(line)[key] for line in (run / "curve.jsonl").read_text().splitlines()]


def test_curve_is_the_median_and_the_band_reaches_all_seeds(runs, tmp_path):
    figure = plots.curve(runs, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    ntm, lstm = axes.get_lines()
    both = np.array([column(r, "eval_loss") for r in runs[:2]])
    np.testing.assert_allclose(ntm.get_ydata(), np.median(both, 0))
    np.testing.assert_allclose(ntm.get_xdata(), [16, 32])
    np.testing.assert_allclose(lstm.get_ydata(), column(runs[2], "eval_loss"))
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(both.min()) and edges.max() == pytest.approx(both.max())
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["NTM (median of 2 seeds, band: all)", "LSTM"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sequences", "validation loss, bits per sequence")
    assert axes.get_title() == "copy"


def test_curve_keeps_other_settings_apart_and_takes_zeros_on_a_log_axis(runs, tmp_path):
    other = folder(tmp_path / "d", lr=5e-3)
    figure = plots.curve([runs[0], other], metric="wrong_bits", x="step", log=True)
    labels = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert labels == ["NTM (1)", "NTM (2)"] and figure.axes[0].get_yscale() == "log"
    rows = [json.loads(line) for line in (other / "curve.jsonl").read_text().splitlines()]
    rows[-1] |= {"wrong_bits": 0.0, "accuracy": [0.25, 0.75]}
    (other / "curve.jsonl").write_text("".join(json.dumps({**rows[-1], **r, "accuracy": [0.25, 0.75]}) + "\n" for r in rows))
    figure = plots.curve([other], metric="wrong_bits", log=True)
    assert figure.axes[0].get_yscale() == "symlog" and plots.png(figure)
    figure = plots.curve([other], metric="accuracy.2")
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), [0.75, 0.75])


def test_curve_of_records_without_their_weights(runs, tmp_path):
    for i, run in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "curve.jsonl").write_bytes((run / "curve.jsonl").read_bytes())
        config = load_checkpoint(run / "checkpoint.safetensors").meta["user"]
        (tmp_path / str(i) / "result.json").write_text(json.dumps({"config": config}))
    kept, bare = plots.curve(runs), plots.curve([tmp_path / str(i) for i in range(len(runs))])
    lines = [[(line.get_label(), list(line.get_ydata())) for line in f.axes[0].get_lines()] for f in (kept, bare)]
    assert lines[0] and lines[0] == lines[1]


def test_curve_refuses_what_is_no_run(runs, tmp_path):
    with pytest.raises(ValueError, match="must be a memcore checkpoint, got no such file"):
        plots.curve([tmp_path])
    with pytest.raises(ValueError, match="'metric' must be one of step, .*, got 'colour'"):
        plots.curve(runs, metric="colour")
    bare = folder(tmp_path / "e")
    (bare / "curve.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one row"):
        plots.curve([bare])
    (bare / "curve.jsonl").unlink()
    with pytest.raises(ValueError, match="readable curve.jsonl"):
        plots.curve([bare])


def test_memory_shows_the_trace(runs, tmp_path):
    figure = plots.memory(runs[0], tmp_path / "m.svg", overrides={"length": 3})
    assert b"<svg" in (tmp_path / "m.svg").read_bytes()
    shown = {a.get_title(): np.asarray(a.get_images()[0].get_array()) for a in figure.axes if a.get_images()}
    assert list(shown) == [
        "inputs", "target (above), output (below)", "", "add vectors", "read vectors", "write weightings", "read weightings",
        "memory at the end (slots in use)",
    ]  # fmt: skip
    model, task, _ = plots.load_run(runs[0])
    batch = task.sample(1, generator=torch.Generator().manual_seed(0), length=3)
    np.testing.assert_allclose(shown["inputs"], batch.input[:, 0].T)
    trace = model.trace(batch.input)
    np.testing.assert_allclose(shown["add vectors"], trace["add"][:, 0, 0].T.detach(), rtol=1e-6)
    assert shown["read weightings"].shape[1] == 7
    with pytest.raises(ValueError, match="LSTMBaseline, which has no memory"):
        plots.memory(runs[2])


@pytest.mark.parametrize(
    "busy, expected",
    [
        ([4, 5, 6], [2, 3, 4, 5, 6, 7, 8]),
        ([9, 0, 1], [7, 8, 9, 0, 1, 2, 3]),  # the ring is cut at the widest gap
        ([0, 2, 4, 6, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([], list(range(10))),
    ],
)
def test_slots_in_use_are_one_stretch_of_the_ring(busy, expected):
    weights = np.full((3, 1, 10), 0.01)
    weights[1, 0, busy] = 0.5
    assert plots._used(weights).tolist() == expected


def test_heads_are_stacked_with_a_gap():
    x = np.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_array_equal(plots._stack(x), [[0, 1, 2, np.nan, 3, 4, 5], [6, 7, 8, np.nan, 9, 10, 11]])


def test_mann_traces_are_drawn_too():
    import memcore

    task = make("copy", bits=2)
    model = memcore.MANN(task.input_size, task.output_size, memory_slots=6, slot_width=4, controller_size=5, read_heads=2)
    figure = plots.memory_figure(model, task, task.sample(1, length=3))
    assert "2 heads" in " ".join(a.get_ylabel() for a in figure.axes)
