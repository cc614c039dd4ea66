"""`make gpu` writes one file whatever happens."""

import json

import report
import torch


def test_one_file_without_a_gpu(tmp_path):
    """The tests run dry, the benchmark says that there is no GPU."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'numbers differ'\n@pytest.mark.skip(reason='not here')\ndef test_skipped(): pass\n"
    )
    out = tmp_path / "report.json"
    tests = f"{tmp_path / 'test_it.py'} -c {tmp_path / 'none.ini'} -p no:cacheprovider --rootdir {tmp_path}"
    (tmp_path / "none.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--slow', action='store_true')\n")
    assert report.main(["--out", str(out), "--tests", tests, "--bench", "ops --op read --quick"]) == 1
    found = json.loads(out.read_text())
    assert found["tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1} and found["tests"]["skipped"] == {"not here": 1}
    ((name, text),) = found["tests"]["failures"].items()
    assert "test_bad" in name and "numbers differ" in text
    assert found["environment"]["torch"] == torch.__version__ and found["environment"]["memcore"]["operators"] is not None
    if not torch.cuda.is_available():
        assert found["bench"]["code"] == 2 and "without a CUDA device" in found["bench"]["error"]
