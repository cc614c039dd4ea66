"""The documents say what is so: their examples run, what they point to is there, their commands and switches exist."""

import re
from pathlib import Path

import pytest
import torch

from memcore import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "docs/benchmarks.md", "docs/benchmarks-avx2.md", "docs/benchmarks-amx.md", "docs/dnd.md", "docs/gpu.md", "docs/gpu-resources.md", "docs/gpu-traffic.md")}
CODE = re.compile(r"```(\w*)\n(.*?)```", re.S)
each = pytest.mark.parametrize("name", DOCUMENTS)


def test_the_examples_of_the_readme_run():
    (example,) = [text for language, text in CODE.findall(DOCUMENTS["README.md"]) if language == "python"]
    assert len(example.split("\n")) < 20
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert torch.allclose(names["weights"].sum(-1), torch.ones(16, 1)) and names["weights"].shape == (16, 1, 128)
    assert names["step"].reads.shape == (16, 1, 20) and names["interface"].grad.abs().sum() > 0
    assert names["output"].shape == (40, 16, 8) and names["state"].memory.shape == (16, 128, 20)


def test_the_examples_of_the_dictionary_run():
    names = {}
    for language, text in CODE.findall(DOCUMENTS["docs/dnd.md"]):
        if language == "python":
            exec(compile(text, "docs/dnd.md", "exec"), names)
    assert names["values"].shape == (3, 32, 1) and names["store"].counts == [8, 0, 0]


@each
def test_links_and_paths_lead_somewhere(name):
    text = CODE.sub("", DOCUMENTS[name])
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target
    tops = {p.name for p in ROOT.iterdir() if p.is_dir()}
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", text):
        if path.partition("/")[0] in tops and "fade" not in path:  # the example that CONTRIBUTING.md makes up
            assert (ROOT / path).exists(), path


@each
def test_commands_and_targets_exist(name):
    commands = next(a for a in cli._parser()._actions if a.dest == "command").choices
    text = DOCUMENTS[name]
    used = re.findall(r"\bmemcore ([a-z]+)\b", "\n".join(re.findall(r"`[^`]+`", text) + [code for _, code in CODE.findall(text)]))
    assert set(used) <= commands.keys(), used
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_both_tables_of_switches_hold_every_switch():
    sources = [p for top in ("memcore", "kernels", "bench", "csrc", "tests") for p in (ROOT / top).rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    code = "\n".join(p.read_text(encoding="utf-8") for p in [*sources, ROOT / "setup.py", ROOT / "Makefile"] if p != Path(__file__))
    for name in ("README.md", "CONTRIBUTING.md"):
        documented = set(re.findall(r"^\| `(MEMCORE_[A-Z_]+)`", DOCUMENTS[name], re.M))
        assert documented == set(re.findall(r"\bMEMCORE_[A-Z]+(?:_[A-Z]+)*\b", code)), name
