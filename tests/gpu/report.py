"""`make gpu`: the tests on the GPU and the benchmark, one after the other, into ONE file to send back.

The file holds the environment, the outcome of every test with the text of what failed, and every row of the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def outcomes(junit: Path) -> dict[str, Any]:
    """{"counts", "failures": id -> text, "skipped": reason -> how many, "seconds": id -> time of the slowest} of pytest's XML."""
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failures, seconds = {}, {}
    for case in ET.parse(junit).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds[name] = float(case.get("time", 0))
        bad = [e for e in case if e.tag in ("failure", "error")]
        skips = [e for e in case if e.tag == "skipped"]
        counts["failed" if bad else "skipped" if skips else "passed"] += 1
        if bad:
            failures[name] = "\n".join(e.text or e.get("message", "") for e in bad)[-6000:]
        for e in skips:
            skipped[e.get("message", "")] += 1
    slowest = dict(sorted(seconds.items(), key=lambda item: -item[1])[:20])
    return {"counts": dict(counts), "failures": failures, "skipped": dict(skipped), "seconds": slowest}


def run_tests(arguments: list[str]) -> dict[str, Any]:
    """pytest in a process of its own: a fault on the GPU ends that one alone."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--slow", f"--junitxml={junit}", *arguments]
        code = subprocess.run(command, cwd=ROOT).returncode
        found = outcomes(junit) if junit.exists() else {"counts": {}, "failures": {"pytest": f"ended with code {code} and left no report"}}
    return {"command": " ".join(["pytest", *command[3:]]).replace(str(junit), "JUNIT"), "code": code, **found}


def run_bench(arguments: list[str]) -> dict[str, Any]:
    """`memcore bench` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "memcore", "bench", *arguments, "--out", folder]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        path = Path(folder) / "gpu.json"
        if not path.exists():
            return {"code": done.returncode, "error": done.stderr[-6000:]}
        return {"code": done.returncode, **json.loads(path.read_text(encoding="utf-8"))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="gpu-report.json", help="the file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tests", default="tests/gpu tests/test_gpu_resources.py", help="what pytest gets")
    parser.add_argument("--bench", default="train step sequence knn ops", help="suites and options of memcore bench")
    args = parser.parse_args(argv)

    from memcore.bench.gpu import environment

    report: dict[str, Any] = {"environment": environment(args.device), "tests": run_tests(args.tests.split())}
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # if the benchmark should take the machine down
    report["bench"] = run_bench([*args.bench.split(), "--device", args.device])
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    counts = report["tests"]["counts"]
    print(f"tests: {', '.join(f'{n} {what}' for what, n in counts.items()) or 'none ran'}; benchmark: {len(report['bench'].get('rows', []))} rows")
    print(f"wrote {args.out}: please send it back")
    return int(bool(report["tests"]["code"] or report["bench"]["code"]))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
