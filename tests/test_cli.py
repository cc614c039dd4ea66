"""The command line: what it prints where, its exit codes, its one-sentence errors, Ctrl-C."""

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
from memcore.tasks import names
from memcore.train import PRESETS, configure, load_checkpoint, preset

pytest.importorskip("safetensors")

TINY = ["--set", "bits=2", "--set", "max_length=3", "--steps", "3", "--eval-every", "2", "--test-sequences", "2", "--quiet"]
LSTM = ["train", "lstm", *TINY, "--hidden-size", "4", "--layers", "1"]
NTM = ["train", "ntm", *TINY, "--slots", "6", "--width", "4", "--controller-size", "5"]


def memcore(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as e:  # argparse
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(autouse=True)
def restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert cli.main([*NTM, "--out", str(folder / "r")]) == 0
    return folder / "r"


def test_train_writes_a_run_and_prints_json_alone_on_stdout(capsys, tmp_path):
    code, out, err = memcore(capsys, *LSTM, "--out", str(tmp_path / "r"), "--json", "--seed", "3", "--threads", "1")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["task"], result["model"], result["seed"], result["updates"], result["sequences"]) == ("copy", "lstm", 3, 3, 24)
    assert result["parameters"] == 4 * 4 * (3 + 4) + 2 * 16 + 4 * 2 + 2
    assert result["threads"] == 1 and result["stopped"] == "steps" and result["split"] == "generated"
    assert set(result["test"]) == {"10", "20", "30", "40", "50", "80", "120"}
    assert result["test"]["20"]["bits"] > 0 and result["versions"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (tmp_path / "r" / "curve.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 3]
    assert "copy, lstm, seed 3" in err


def test_baseline_and_seeds_are_four_runs_on_equal_data(capsys, tmp_path):
    argv = [*NTM, "--hidden-size", "4", "--baseline", "--seeds", "0,1", "--out", str(tmp_path), "--json"]
    code, out, err = memcore(capsys, *argv)
    assert code == 0, err
    runs = json.loads(out)["runs"]
    assert [(r["model"], r["seed"]) for r in runs] == [("ntm", 0), ("lstm", 0), ("ntm", 1), ("lstm", 1)]
    assert len({r["updates"] for r in runs}) == 1 and {p.name for p in tmp_path.iterdir()} == {
        "ntm-seed0", "lstm-seed0", "ntm-seed1", "lstm-seed1"
    }  # fmt: skip
    code, out, err = memcore(capsys, *argv, "--resume")
    assert code == 0 and err.count("finished before") == 4 and json.loads(out)["runs"] == runs


def test_resume_goes_on_and_only_the_length_may_change(capsys, tmp_path):
    constant = [*LSTM, "--schedule", "constant", "--out", str(tmp_path / "r")]
    assert memcore(capsys, *constant)[0] == 0
    code, out, err = memcore(capsys, *constant, "--resume", "--steps", "5", "--json")
    assert code == 0 and json.loads(out)["updates"] == 5
    code, out, err = memcore(capsys, *constant, "--resume", "--lr", "0.5")
    assert code == 2 and "as in the run that is resumed" in err
    code, out, err = memcore(capsys, *constant)
    assert code == 2 and "add --resume to continue it" in err


def test_eval_of_all_of_some_and_of_a_setting_of_ones_own(capsys, run):
    code, out, err = memcore(capsys, "eval", str(run), "--sequences", "2", "--json")
    result = json.loads((run / "result.json").read_text())
    assert code == 0 and json.loads(out)["test"] == result["test"]
    code, out, _ = memcore(capsys, "eval", str(run / "checkpoint.safetensors"), "--settings", "20,10", "--sequences", "1", "--json")
    assert code == 0 and list(json.loads(out)["test"]) == ["20", "10"]
    code, out, _ = memcore(capsys, "eval", str(run), "--set", "length=2", "--sequences", "1")
    assert code == 0 and "length=2" in out and "wrong_bits" in out


def test_settings_whose_names_hold_commas():
    from memcore.cli import _named

    known = ["T=10", "T=10,R=20", "in range"]
    assert _named("T=10,R=20,in range", known) == ["T=10,R=20", "in range"]
    assert _named("in range,T=10", known) == ["in range", "T=10"]
    for bad in ("", "T=10,R=2", "in range,40"):
        with pytest.raises(ValueError, match="'--settings' must name some of"):
            _named(bad, known)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "ntm", "--task", "sorting"], "'task' must be one of copy, repeat-copy, .*, got 'sorting'"),
        (["train", "ntm", "--preset", "best"], "'preset' must be one of default, paper, got 'best'"),
        (["train", "ntm", "--shift-width", "4"], "'--shift-width' must be odd and >= 1, got 4"),
        (["train", "lstm", "--slots", "4"], "'--slots' is an option of ntm, mann, got model 'lstm'"),
        (["train", "ntm", "--read-heads", "-1"], "'read_heads' must be at least 0, got -1"),
        (["train", "ntm", "--first-weighting", "uniform"], "'first_weighting' must be 'learned' or 'onehot'"),
        (["train", "ntm", "--set", "colour=1"], "unknown option 'colour'"),
        (["train", "ntm", "--set", "max_length=0"], "'max_length' must be at least 1, got 0"),
        (["train", "ntm", "--set", "max_length=many"], "'max_length' must be an int, got str"),
        (["train", "ntm", "--steps", "0"], "'steps' must be an integer >= 1, got 0"),
        (["train", "ntm", "--lr", "-1"], "'lr' must be > 0 and finite, got -1"),
        (["train", "ntm", "--device", "abacus"], "'device' must be cpu or a GPU that torch sees, got 'abacus'"),
        (["train", "ntm", "--threads", "0"], "'--threads' must be >= 1, got 0"),
        (["train", "ntm", "--backend", "triton"], "backend 'triton' is not available for cpu tensors"),
        (["train", "ntm", "--resume"], "must be a memcore checkpoint, got no such file"),
        (["train", "ntm", "--test-sequences", "0"], "'test_sequences' must be >= 1, got 0"),
        (["eval", "."], "must be a memcore checkpoint, got no such file"),
        (["plot", "curve", "."], "must be a memcore checkpoint, got no such file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = memcore(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("memcore: error: ")
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "ntm", "--steps", "many"], "invalid int value: 'many'"),
        (["train", "gpt"], "invalid choice: 'gpt'"),
        (["train", "ntm", "--set", "max_length"], "must be NAME=VALUE, got 'max_length'"),
        (["train", "ntm", "--seeds", "0;1"], "invalid comma-separated seeds value: '0;1'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
)
def test_what_does_not_parse_is_told_with_the_usage(capsys, argv, message):
    code, out, err = memcore(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("usage: ") and message in err


def test_no_command_prints_the_help(capsys):
    code, out, _ = memcore(capsys)
    assert code == 2 and "memcore demo" in out
    code, out, _ = memcore(capsys, "train", "--help")
    assert code == 0 and "presets (updates x batch" in out and "[ntm, mann]" in out
    code, out, _ = memcore(capsys, "--version")
    assert code == 0 and out.count(".") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="a folder where not even root may write")
def test_an_unwritable_folder_is_told(capsys):
    code, _, err = memcore(capsys, *LSTM, "--out", "/proc/memcore/r")
    assert code == 2 and "'out' must be a writable folder, got '/proc/memcore/r'" in err


def test_a_file_in_the_place_of_the_folder_is_told(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = memcore(capsys, *LSTM, "--out", str(tmp_path / "file"))
    assert code == 2 and "'out' must be a folder, got the file" in err
    code, _, err = memcore(capsys, *LSTM, "--out", str(tmp_path / "file" / "r"))
    assert code == 2 and "'out' must be a writable folder" in err and "Not a directory" in err


def test_a_damaged_checkpoint_is_refused(capsys, run, tmp_path):
    data = bytearray((run / "checkpoint.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "checkpoint.safetensors").write_bytes(data)
    for argv in (["eval", str(tmp_path)], [*NTM, "--resume", "--out", str(tmp_path)]):
        code, out, err = memcore(capsys, *argv)
        assert code == 2 and "a damaged file: its checksum does not match its content" in err


def test_missing_data_is_told(capsys, tmp_path):
    code, _, err = memcore(capsys, "train", "mann", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "r"))
    assert code == 2 and "omniglot" in err and "data get omniglot" in err
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, signum, code):
    folder = tmp_path / "r"
    argv = [*LSTM, "--schedule", "constant", "--out", str(folder)]
    argv[argv.index("--steps") + 1] = "1000000"
    command = [sys.executable, "-m", "memcore", *argv, "--threads", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    try:
        for _ in range(600):
            if (folder / "curve.jsonl").exists() and (folder / "curve.jsonl").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert out == "" and "Traceback" not in err and "go on with --resume" in err
    step = load_checkpoint(folder / "checkpoint.safetensors").meta["train"]["step"]
    assert step >= 2 and not (folder / "result.json").exists() and f"interrupted at update {step} of 1000000" in err
    argv[argv.index("1000000")] = str(step + 3)
    assert cli.main([*argv, "--resume"]) == 0
    assert json.loads((folder / "result.json").read_text())["updates"] == step + 3


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["ntm", "mann", "lstm"])
def test_every_task_has_a_preset_that_builds(name, model):
    import memcore
    from memcore.train.experiment import build

    assert set(PRESETS["default"]) == set(names()) == set(cli.TASKS)
    for task in PRESETS[name]:
        found = preset(name, task, model)
        assert found["train"]["steps"] > 0 and found["train"]["batch_size"] > 0
        if task == "omniglot":  # needs its drawings; the model alone
            cls = {"ntm": memcore.NTM, "mann": memcore.MANN, "lstm": memcore.LSTMBaseline}[model]
            cls(405, 5, **found["model"])
        else:
            build(configure(model, task, name=name))


def test_plots_from_the_command_line(capsys, run, tmp_path):
    for kind in ("curve", "memory"):
        code, out, err = memcore(capsys, "plot", kind, str(run), "--out", str(tmp_path / f"{kind}.png"), "--json")
        assert code == 0, err
        assert Path(json.loads(out)["plot"]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, _, err = memcore(capsys, "plot", "curve", str(run), "--metric", "colour")
    assert code == 2 and "'metric' must be one of step, sequences, loss, eval_loss, bits" in err
    code, _, err = memcore(capsys, "plot", "curve", str(run), "--out", str(tmp_path / "a.xyz"))
    assert code == 2 and "xyz" in err and not (tmp_path / "a.xyz").exists()
    code, _, err = memcore(capsys, "plot", "accuracy", str(run))
    assert code == 2 and "'runs' must be of task omniglot, got copy" in err


def test_doctor(capsys):
    code, out, err = memcore(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["versions"]["torch"] == torch.__version__
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert {"ntm_step", "content_addressing", "lrua_write"} <= report["operators"].keys()
    code, out, _ = memcore(capsys, "doctor")
    assert code == 0 and "ntm_step" in out and torch.__version__ in out


def nobody_reads(**options):
    """A text stream into a pipe whose other end is closed."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", **options)


@pytest.mark.skipif(os.name != "posix", reason="pipes as they are here")
@pytest.mark.parametrize("broken", ["stdout", "stderr"])
@pytest.mark.parametrize("command", ["train", "eval", "plot", "bench", "data", "doctor", "demo"])
def test_a_reader_that_has_gone_ends_every_command_without_a_word(command, broken, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("memcore.demo.run_demo", lambda *args, log, **options: log("training") or {})
    argv = {
        "train": [*LSTM[:-5], *LSTM[-4:], "--out", str(tmp_path / "r")],
        "eval": ["eval", str(run), "--sequences", "1", "--json"],
        "plot": ["plot", "curve", str(run), "--out", str(tmp_path / "a.png"), "--json"],
        "bench": ["bench", "--op", "read", "--quick", "--no-compile", "--threads", "1", "--json"],
        "data": ["data", "list"] if broken == "stdout" else ["data", "get", "nothing"],
        "doctor": ["doctor", "--json"],
        "demo": ["demo", "--out", str(tmp_path / "report")],
    }
    assert argv.keys() == next(a for a in cli._parser()._actions if a.dest == "command").choices.keys()
    with nobody_reads(buffering=1) as stream:
        monkeypatch.setattr(sys, broken, stream)
        assert cli.main(argv[command]) == 141
        monkeypatch.undo()
    said = capsys.readouterr()
    assert "rror" not in said.out + said.err and "roken" not in said.out + said.err


@pytest.mark.skipif(os.name != "posix", reason="pipes as they are here")
@pytest.mark.parametrize(
    "argv, unbuffered", [("memcore doctor", ""), ("memcore doctor", "1"), ("memcore --help", "1"), ("memcore.bench table", ""), ("memcore.data list", "1")]
)
def test_a_reader_that_has_gone_is_no_traceback(argv, unbuffered):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with nobody_reads() as stream:
        done = subprocess.run(
            [sys.executable, "-m", *argv.split()], stdout=stream, stderr=subprocess.PIPE, text=True, env=env, cwd=Path(__file__).parent.parent
        )
    told = [line for line in done.stderr.splitlines() if not line.startswith("memcore runs on plain PyTorch")]  # where nothing is built
    assert told == [] and done.returncode in ((0, 141) if unbuffered and "--help" in argv else (141,))  # some argparse minds no pipe
