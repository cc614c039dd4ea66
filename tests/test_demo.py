"""The demo's report: complete without Omniglot, without matplotlib and without a compiler."""

import json

import pytest
import torch

from memcore import demo

pytest.importorskip("safetensors")


@pytest.fixture
def quick(monkeypatch):
    def no_compiler(*args, **kwargs):
        def fail(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nat all")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "TEST_SEQUENCES", 2)
    monkeypatch.setattr(demo, "MANN_MINUTES", 0.001)


@pytest.mark.parametrize("matplotlib", [True, False])
def test_the_report_is_one_page_and_its_numbers(tmp_path, quick, monkeypatch, matplotlib):
    if matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    lines = []
    report = demo.run_demo(tmp_path / "r", minutes=0.001, data=tmp_path / "none", log=lines.append)
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == report
    page = (tmp_path / "r" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == (2 if matplotlib else 0)
    assert ("pip install &quot;memcore[train]&quot;" in page) is not matplotlib
    assert "http" not in page  # nothing is fetched
    assert report["mann"] is None and "memcore data get omniglot" in page
    assert set(demo.LENGTHS) <= report["copy"]["test"].keys() and f"{report['copy']['test']['120']['bits']:.2f}" in page
    assert [r["variant"] for r in report["timing"]["rows"]][1:] == ["eager PyTorch, tuned"]
    assert all(r["ms"] > 0 for r in report["timing"]["rows"])
    assert report["timing"]["notes"] == ["torch.compile of the step: not measured, no C++ compiler at all"]
    assert any("no MANN: " in line for line in lines)
