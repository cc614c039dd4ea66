"""`memcore train nec`, `plot returns`, `eval` of an agent: what they print, their folders, one sentence for bad input, a signal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from memcore import cli
from memcore.rl import plots
from memcore.train import load_checkpoint

pytest.importorskip("safetensors")

TINY = ["train", "nec", "--env", "Catch", "--steps", "400", "--log-every", "100",
        "--hidden", "8", "--key-width", "4", "--test-episodes", "2",
        "--eval-episodes", "2", "--period", "20", "--quiet"]  # fmt: skip
NEC = [*TINY, "--capacity", "40", "--neighbours", "5"]
DQN = [*TINY, "--agent", "dqn"]


def memcore(capsys, *argv):
    try:
        code = cli.main(argv)
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(autouse=True)
def restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    extra = ["--steps", "950"]
    assert cli.main([*NEC, *extra, "--seeds", "0,1", "--baseline", "--out", str(folder)]) == 0
    return folder


def test_one_run_prints_json_alone_on_stdout(capsys, tmp_path):
    code, out, err = memcore(capsys, *NEC, "--out", str(tmp_path / "r"), "--json", "--seed", "3", "--threads", "1")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["task"], result["model"], result["seed"], result["steps"], result["episodes"]) == ("Catch", "nec", 3, 400, 44)
    assert result["parameters"] == 50 * 8 + 8 + 8 * 4 + 4 and result["threads"] == 1
    assert result["config"]["model_options"]["capacity"] == 40 and result["config"]["train"]["n_step"] == 100
    assert [json.loads(line)["step"] for line in (tmp_path / "r" / "curve.jsonl").read_text().splitlines()] == [100, 200, 300, 400]
    assert "Catch, nec, seed 3: 400 steps, 44 episodes" in err
    code, _, err = memcore(capsys, *NEC, "--out", str(tmp_path / "r"))
    assert code == 2 and "add --resume to continue it" in err
    code, out, err = memcore(capsys, *NEC, "--out", str(tmp_path / "r"), "--seed", "3", "--resume", "--steps", "500", "--json")
    assert code == 0 and json.loads(out)["steps"] == 500
    code, _, err = memcore(capsys, *NEC, "--out", str(tmp_path / "r"), "--seed", "3", "--resume", "--lr", "0.5")
    assert code == 2 and "as in the run that is resumed" in err


def test_the_baseline_gets_as_many_steps_and_its_own_options(capsys, runs):
    found = {p.name: json.loads((p / "result.json").read_text()) for p in runs.iterdir() if p.is_dir()}
    assert set(found) == {"nec-seed0", "nec-seed1", "dqn-seed0", "dqn-seed1"}
    assert {r["steps"] for r in found.values()} == {950} and all(r["config"]["model_options"]["hidden"] == 8 for r in found.values())
    assert "capacity" not in found["dqn-seed0"]["config"]["model_options"]
    code, _, err = memcore(capsys, *NEC, "--steps", "950", "--seeds", "0,1", "--baseline", "--out", str(runs), "--resume")
    assert code == 0 and err.count("finished before") == 4


def test_comparison_at_equal_steps(runs):
    table = {(r["model"], r["seed"]): r for r in plots.compare(sorted(p for p in runs.iterdir() if p.is_dir()), level=-2.0)}
    for seed in (0, 1):
        read = lambda name: [json.loads(x) for x in (runs / f"{name}-seed{seed}" / "curve.jsonl").read_text().splitlines()]  # noqa: E731
        nec = [r for row in read("nec") for r in row["returns"]]
        assert table["nec", seed]["return_51_100"] == pytest.approx(sum(nec[50:100]) / 50)
        dqn = [r for row in read("dqn") for r, e in zip(row["returns"], row["ends"]) if 450 < e <= 900]  # Catch: nine steps an episode
        assert table["dqn", seed]["return_at_equal_steps"] == pytest.approx(sum(dqn) / len(dqn))
        assert table["nec", seed]["reached"] == 100 and table["nec", seed]["episodes"] == 105


def test_plots_of_returns(capsys, runs, tmp_path):
    folders = [str(p) for p in sorted(runs.iterdir()) if p.is_dir()]
    code, out, err = memcore(capsys, "plot", "returns", *folders, "--out", str(tmp_path / "a.png"), "--level", "0.9", "--json")
    assert code == 0, err
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and len(json.loads(out)["runs"]) == 4
    figure = plots.returns(folders)
    top, entries, distances = figure.axes
    assert [t.get_text() for t in top.get_legend().get_texts()] == ["DQN (median of 2 seeds, band: all)", "NEC (median of 2 seeds, band: all)"]
    last = [json.loads((runs / f"nec-seed{s}" / "curve.jsonl").read_text().splitlines()[-1]) for s in (0, 1)]
    assert entries.lines[0].get_ydata()[-1] == sum(sum(r["memory"]) for r in last) / 2
    assert distances.lines[1].get_ydata()[-1] == pytest.approx(sum(r["furthest"] for r in last) / 2)
    only = plots.returns([f for f in folders if "dqn" in f])
    assert len(only.axes) == 1


def test_eval_of_an_agent(capsys, runs):
    code, out, err = memcore(capsys, "eval", str(runs / "nec-seed0"), "--sequences", "2", "--json")
    assert code == 0, err
    result = json.loads((runs / "nec-seed0" / "result.json").read_text())
    assert json.loads(out)["test"] == {k: result["test"][k] for k in ("mean", "min", "max")}
    code, out, _ = memcore(capsys, "eval", str(runs / "dqn-seed0"), "--seed", "4", "--sequences", "3")
    assert code == 0 and "Catch, dqn: 3 greedy episodes, mean return" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*NEC, "--env", "MinAtar/Chess-v1"], "'name' must be MinAtar/ and one of"),
        ([*NEC, "--capacity", "0"], "'capacity' must be at least 1, got 0"),
        ([*NEC, "--neighbours", "-1"], "'neighbours' must be at least 1, got -1"),
        ([*NEC, "--delta", "0"], "'delta' must be > 0, got 0.0"),
        ([*NEC, "--alpha", "2"], r"'alpha' must be in \(0, 1\], got 2.0"),
        ([*NEC, "--encoder", "nature"], "'observation_shape' must be"),
        ([*NEC, "--steps", "0"], "'steps' must be an integer >= 1, got 0"),
        ([*NEC, "--lr", "nan"], "'lr' must be > 0 and finite, got nan"),
        ([*NEC, "--epsilon-end", "2"], r"'epsilon_end' must be in \[0, 1\], got 2.0"),
        ([*NEC, "--seed", "-1"], "'seed' must be an integer >= 0, got -1"),
        ([*NEC, "--n-step", "0"], "'n_step' must be an integer >= 1, got 0"),
        ([*NEC, "--test-episodes", "0"], "'test_episodes' must be >= 1, got 0"),
        ([*NEC, "--threads", "0"], "'--threads' must be >= 1, got 0"),
        ([*NEC, "--target-every", "5"], "'--target-every' is an option of agent dqn, got agent 'nec'"),
        ([*DQN, "--capacity", "5"], "'--capacity' is an option of agent nec, got agent 'dqn'"),
        ([*NEC, "--resume"], "must be a memcore checkpoint, got no such file"),
        (["train", "--seed", "1", "nec"], "'nec' must come first"),
        (["plot", "returns", "."], "'runs' must be folders with a readable curve.jsonl|got no such file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = memcore(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("memcore: error: ")
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_runs_of_the_other_kind_are_told_apart(capsys, runs, tmp_path):
    other = ["train", "lstm", "--set", "bits=2", "--set", "max_length=3", "--steps", "2", "--test-sequences", "1", "--quiet"]
    assert memcore(capsys, *other, "--hidden-size", "4", "--layers", "1", "--out", str(tmp_path / "r"))[0] == 0
    code, _, err = memcore(capsys, "plot", "returns", str(tmp_path / "r"))
    assert code == 2 and "'runs' must be runs of `memcore train nec`" in err
    for metric in ([], ["--metric", "loss"]):
        code, _, err = memcore(capsys, "plot", "curve", str(runs / "nec-seed0"), *metric)
        assert code == 2 and "memcore plot returns" in err, err
    code, _, err = memcore(capsys, "plot", "memory", str(runs / "nec-seed0"))
    assert code == 2 and "must be written by" in err
    code, _, err = memcore(capsys, "eval", str(runs / "nec-seed0"), "--settings", "20")
    assert code == 2 and "'--settings' is an option of tasks" in err
    code, _, err = memcore(capsys, "eval", str(runs / "nec-seed0"), "--sequences", "0")
    assert code == 2 and "'--sequences' must be >= 1, got 0" in err


def test_help_names_every_flag(capsys):
    from memcore.rl.cli import MODEL_FLAGS, TRAIN_FLAGS

    code, out, _ = memcore(capsys, "train", "nec", "--help")
    assert code == 0 and all(flag in out for flag in (*MODEL_FLAGS, *TRAIN_FLAGS, "--env", "--agent", "--baseline", "--seeds"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "r"
    argv = [*NEC, "--out", str(folder)]
    argv[argv.index("--steps") + 1] = "1000000"
    process = subprocess.Popen(
        [sys.executable, "-m", "memcore", *argv, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        for _ in range(600):
            if (folder / "curve.jsonl").exists() and (folder / "curve.jsonl").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and "Traceback" not in err and "go on with --resume" in err, err
    step = load_checkpoint(folder / "checkpoint.safetensors").meta["train"]["step"]
    assert step >= 100 and not (folder / "result.json").exists() and f"interrupted at step {step} of 1000000" in err
    argv[argv.index("1000000")] = str(step + 3)
    assert cli.main([*argv, "--resume"]) == 0
    assert json.loads((folder / "result.json").read_text())["steps"] == step + 3
