"""The benchmarks measure the right thing: baselines agree with the reference, counters count, rows and tables are sound."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import memcore
from memcore.bench import base, baselines, bench_store, cases, measure, rows, runner
from memcore.bench import sequence as sequence_suite
from memcore.bench.__main__ import main
from memcore.bench.cases import CASES, SHAPES, STEPS, Gate, Shape, StepCase
from memcore.bench.measure import Timing
from memcore.kernels.ntm_sequence.op import saved_numbers


@pytest.mark.parametrize("variant", ["eager", "naive"])
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("shape", [SHAPES["tiny"], Shape(2, 1, 63, 20)], ids=str)
def test_a_baseline_equals_the_reference_with_its_gradients(op, shape, variant):
    function = CASES[op].baseline(variant)
    if function is None:
        assert (op, variant) == ("split_interface", "naive")
        return
    cases.check(CASES[op], shape, variant, function, CASES[op].inputs(shape, seed=3))


def test_every_public_operator_is_measured():
    public = {name for name in memcore.functional.__all__ if name.islower() and not name.endswith("_")}
    assert public == {*CASES, "ntm_step", "ntm_sequence", "mann_sequence", "knn_cache", "knn_lookup", "knn_search"}  # by suites of their own


@pytest.mark.parametrize("op", ["read", "lrua_write"])
def test_a_wrong_result_is_never_timed(op):
    case, shape = CASES[op], SHAPES["tiny"]
    right = case.baseline("eager")

    def wrong(*xs):
        y = right(*xs)
        return y * 1.01 if isinstance(y, torch.Tensor) else (y[0] * 1.01, y[1])

    with pytest.raises(RuntimeError, match=f"output 0 of eager {op} .* differs from memcore.reference by 0.01; nothing is timed"):
        cases.check(case, shape, "eager", wrong, case.inputs(shape))


def test_a_wrong_gradient_is_never_timed():
    case, shape = CASES["read"], SHAPES["tiny"]
    with pytest.raises(RuntimeError, match="gradient 1 of eager read"):
        cases.check(case, shape, "eager", lambda m, w: m.mT.matmul(w.detach().mT).mT + 0 * w.sum(), case.inputs(shape))


def test_the_large_check_looks_at_the_first_and_the_last_items(monkeypatch):
    monkeypatch.setattr(cases, "WHOLE", 0)
    case, shape = CASES["interpolate"], Shape(6, 1, 4, 3)
    right = case.baseline("eager")
    cases.check(case, shape, "eager", right, case.inputs(shape))

    def wrong_at(item):
        def f(*xs):
            y = right(*xs)
            return torch.cat([y[:item], 2 * y[item : item + 1], y[item + 1 :]])

        return f

    cases.check(case, shape, "eager", wrong_at(2), case.inputs(shape))
    for item in (0, 1, 4, 5):
        with pytest.raises(RuntimeError, match="output 0"):
            cases.check(case, shape, "eager", wrong_at(item), case.inputs(shape))


def test_interface_order_moves_every_piece_to_its_place():
    W, R, Hw = 4, 2, 1
    raw = torch.randn(3, 3 * (W + 6) + Hw * 2 * W)
    x = memcore.reference.split_interface(raw, read_heads=R, write_heads=Hw)
    mine = raw[:, baselines.interface_order(W, R, Hw)]
    assert torch.equal(mine[:, :12].view(3, 3, 4), x.key)
    torch.testing.assert_close(torch.nn.functional.softplus(mine[:, 12:18]), torch.cat((x.strength, x.gamma - 1), 1))
    torch.testing.assert_close(torch.sigmoid(mine[:, 18:25]), torch.cat((x.gate, x.erase.flatten(1)), 1))
    assert torch.equal(mine[:, 25:29].view(3, 1, 4), x.add)
    torch.testing.assert_close(mine[:, 29:].view(3, 3, 3).softmax(2), x.shift)


def test_step_baselines_equal_the_reference_through_time():
    # step_variants compares outputs and gradients with float64, and raises if they differ.
    made = runner.step_variants(STEPS["tiny"], ["memcore", "eager", "vectorised", "naive"])
    assert set(made) == {"memcore", "eager", "vectorised", "naive"}
    assert len(made["eager"].both()) == STEPS["tiny"].T + 2


def test_training_baselines_are_the_same_model(monkeypatch):
    monkeypatch.setattr(runner, "COPY_LENGTH", 2)
    made = runner.training_steps(2, ["memcore", "eager", "vectorised", "naive", "floor"])
    first = {name: step() for name, step in made.items()}
    second = {name: step() for name, step in made.items()}
    for name in ("eager", "vectorised", "naive"):
        assert first[name] == pytest.approx(first["memcore"], rel=1e-5)
        assert second[name] == pytest.approx(second["memcore"], rel=1e-4)  # after one update by Adam
    assert second["memcore"] < first["memcore"]
    assert first["floor"] != pytest.approx(first["memcore"], rel=1e-5)


def test_saved_bytes_counts_every_storage_once():
    a, b = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    assert measure.saved_bytes(lambda: a * b) == 800
    assert measure.saved_bytes(lambda: a * b, [a, b]) == 0
    assert measure.saved_bytes(lambda: (a * b).exp(), [a, b]) == 400  # exp keeps its result
    assert measure.saved_bytes(lambda: (lambda y: y.sin() * y.cos())(a * 2), [a]) == 1200  # y once, sin y, cos y
    assert measure.saved_bytes(lambda: (a * 2)[:10].sin(), [a]) == 400  # a view keeps all of its storage
    with torch.no_grad():
        assert measure.saved_bytes(lambda: (a * b).exp()) == 0


def test_a_chain_counts_its_memories():
    case = STEPS["tiny"]
    saved = runner.step_variants(case, ["eager"])["eager"].saved_bytes()
    assert saved >= (case.T + 1) * case.memory_bytes  # what came in at each step, and what was read at the last


def test_aten_calls_counts_the_backward_too():
    a = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert measure.aten_calls(lambda: a * a + a) == 2
    assert measure.aten_calls(lambda: torch.autograd.grad((a * 2).sum(), a)) >= 4


def test_quantiles_interpolate():
    t = Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (t.median, t.quantile(0), t.quantile(1), t.quantile(0.2)) == (3.0, 1.0, 5.0, pytest.approx(1.8))
    assert Timing((1.0, 2.0)).median == 1.5


def test_interleaving_takes_turns():
    seen = []
    made = measure.interleave(
        {"a": lambda: seen.append("a"), "naive": lambda: seen.append("n")}, wall=False, seconds=0, least=8, most=8
    )
    assert len(made["a"].samples) == 8
    assert len(made["naive"].samples) == 2  # context: every fourth round


def _timings(**medians):
    return {name: Timing((m, m, m)) for name, m in medians.items()}


@pytest.fixture
def run():
    return runner.Run(quick=True, about={})


def test_rows_hold_ratios_gates_and_rates(run):
    run.add(
        "ops", "read", SHAPES["small"], "fwd+bwd", 1, _timings(memcore=1e-3, eager=3e-3, compile=2e-3),
        bytes=5e6, flops=2e6, saved={"memcore": 100, "eager": 300}, memory=50, gate=Gate(3, 2.5),
    )  # fmt: skip
    ours, eager, compiled = run.rows
    assert tuple(sorted(ours)) == tuple(sorted(rows.FIELDS))
    assert (ours["ratio_vs_eager"], ours["ratio_vs_compile"]) == (3, 2)
    assert (ours["gate"], ours["passed"]) == ("3x eager, 2.5x compile", False)
    assert (ours["GB/s"], ours["GFLOP/s"], ours["saved_memories"]) == (5, 2, 2)
    assert eager["gate"] is None and compiled["ratio_vs_eager"] == 1.5


def test_gates_pass_at_their_bound_and_need_their_baseline(run):
    run.add("ops", "read", "s", "fwd", 1, _timings(memcore=1.0, eager=3.0), gate=Gate(3))
    run.add("ops", "read", "s", "fwd", 2, _timings(memcore=1.0, eager=3.0), gate=Gate(3))
    run.add("step", "ntm_step", "s", "fwd+bwd", 1, _timings(memcore=1.0, eager=9.0), gate=Gate(3, 2))
    run.add("step", "ntm_step", "s", "fwd+bwd", 1, _timings(memcore=1.0, eager=9.0), saved={"memcore": 5}, memory=4, gate=Gate(3, saved=1.2))
    run.add("calls", "ntm_step", "s", "fwd+bwd", 1, _timings(memcore=61e-6, eager=9.0), gate=Gate(us=60))
    assert [r["passed"] for r in run.rows if r["variant"] == "memcore"] == [True, None, None, False, False]


def test_quick_runs_write_rows_that_read_back(tmp_path, capsys):
    args = ["--quick", "--no-compile", "--threads", "1", "--out", str(tmp_path)]
    assert main(["--op", "read", "--op", "least_used", *args, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = rows.read(tmp_path)
    assert [(r["op"], r["pass"], r["variant"]) for r in found] == [
        *(("read", p, v) for p in ("fwd", "fwd+bwd") for v in ("memcore", "eager", "naive", "least")),
        *(("least_used", "fwd", v) for v in ("memcore", "eager", "naive", "least")),
    ]
    for row, full in zip(found, shown, strict=True):
        assert set(row) == set(rows.FIELDS)
        assert row["ms_median"] == pytest.approx(full["ms_median"], rel=1e-4)
        assert 0 < row["min"] <= row["p20"] <= row["ms_median"] <= row["p80"] <= row["max"]
        assert row["threads"] == 1 and row["clock"] == "cpu" and row["torch"] == torch.__version__
    assert found[0]["gate"] == "2x eager" and isinstance(found[0]["passed"], bool)
    assert found[0]["GB/s"] == pytest.approx((16 * 128 * 20 + 16 * 128 + 16 * 20) * 4 / found[0]["ms_median"] / 1e6, rel=1e-3)
    lines = (tmp_path / rows.JSONL).read_text().splitlines()
    assert [json.loads(line)["op"] for line in lines] == [r["op"] for r in found]
    assert main([*args, "--op", "least_used", "table"]) == 0
    assert "| least_used (16,1,128,20) |" in capsys.readouterr().out


def test_the_sequence_suite_times_every_axis_and_counts_what_is_kept(run, monkeypatch):
    tiny = StepCase(2, 1, 1, 16, 8, 9, Gate())
    monkeypatch.setattr(sequence_suite, "SEQUENCES", {"small": tiny})
    monkeypatch.setattr(sequence_suite, "MANN_SEQUENCES", {"small": replace(tiny, Hw=2, R=2)})
    run.variants, run.threads, run.sizes = ("memcore", "eager"), (1,), ("small",)
    runner.sequence(run)
    ours = [r for r in run.rows if r["variant"] == "memcore"]
    assert [(r["suite"], r["op"]) for r in ours] == [("sequence", "NTM"), ("sequence", "MANN"), *[("scaling", "NTM")] * 8]
    assert [r["pass"].rpartition(" ")[2] for r in ours[2:]] == ["B", "B", "N", "N", "W", "W", "T", "T"]
    if memcore._backend.takes_kernel("ntm_sequence", torch.device("cpu")):
        kept = saved_numbers(9, 2, 9, 100, 16, 8, True, 1, 1, 1, 1, 3)
        first = 2 * (16 * 8 + 8 + 2 * 16 + 2 * 100)  # memory, reads, weights and controller before the first step
        assert 0 <= ours[0]["saved_bytes"] - 4 * (kept["addressing"] + kept["memory"]) <= 4 * first
        theirs = next(r for r in run.rows if r["variant"] == "eager")
        assert theirs["saved_bytes"] > ours[0]["saved_bytes"]


@pytest.fixture
def searches(monkeypatch):
    """The knn suite's module, at a size of next to nothing."""
    from memcore.bench import bench_knn

    monkeypatch.setattr(bench_knn, "QUICK", (((300, 8), (3,)),))
    return bench_knn


def test_the_knn_suite_times_both_kinds_of_keys_and_the_backward(run, searches):
    runner.knn(run)
    ours = [(r["op"], r["pass"], r["shape"]) for r in run.rows if r["variant"] == "memcore"]
    shape = "Gaussian (N=300,D=8,Q=3,K=10)"
    assert ours == [
        ("knn_search", "fwd", shape), ("knn_search, bf16 cache", "fwd", shape), ("knn_lookup, sparse", "bwd", "Gaussian (N=300,D=8,Q=32,K=10)"),
    ]  # fmt: skip
    lines = rows.markdown(run.rows).splitlines()
    assert lines[0].startswith("| the K nearest keys | of | memcore, ms | eager, ms |") and "sparse eager, ms" in lines[0]
    assert lines[2].startswith(f"| knn_search {shape} | fwd |")


def test_wrong_neighbours_are_never_timed(run, searches, monkeypatch):
    right = memcore.functional.knn_search

    def wrong(query, keys, k, *, cache):
        d, i = right(query, keys, k + 1, cache=cache)
        return (d[:, 1:], i[:, 1:]) if cache.mirror is not None else (d[:, :k], i[:, :k])

    monkeypatch.setattr(memcore.functional, "knn_search", wrong)
    with pytest.raises(RuntimeError, match=r"the neighbours of memcore bf16 knn_search Gaussian .* are wrong; nothing is timed"):
        runner.knn(run)
    assert not run.rows


def test_tables_show_the_newest_rows(run, tmp_path):
    for eager in (2e-3, 8e-3):
        run.add("step", "ntm_step", STEPS["small"], "fwd+bwd", 1, _timings(memcore=1e-3, eager=eager, compile=4e-3), saved={"memcore": 7, "eager": 21}, memory=7, gate=Gate(6, 3, 1.2))  # fmt: skip
        rows.append(run.rows, tmp_path)
        run.rows.clear()
    lines = rows.markdown(rows.read(tmp_path)).splitlines()
    assert lines[2] == (
        "| ntm_step (16,1/1,128,20) T=40 | fwd+bwd | 1 | 1 | 8 | 4 | 8.0x | 4.0x | 1.00 (3.00) | 6x eager, 3x compile, saved <= 1.2 | yes |"
    )
    assert len([line for line in lines if line.startswith("| ntm_step")]) == 1
    assert lines[0].split(" | ")[3:8] == ["memcore, ms", "eager, ms", "compile, ms", "vs eager", "vs compile"]
    assert "gates met: 1 of 1" in rows.text(rows.newest(rows.read(tmp_path)))


def test_what_the_arithmetic_alone_takes_has_a_column(run):
    times = _timings(memcore=2.0, eager=22, compile=9, products=1.0)
    run.add("sequence", "NTM", STEPS["small"], "fwd+bwd", 1, times, gate=Gate(12, 5))
    head, _, line = rows.markdown(run.rows).splitlines()[:3]
    assert line.split(" | ")[head.split(" | ").index("products, ms")] == "1e+03"
    assert line.endswith(" | 12x eager, 5x compile | NO |")
    run.rows.clear()
    run.add("knn", "knn_search", "(N=9)", "fwd", 1, _timings(memcore=2.0, eager=9.0, faiss=1.4, products=1.0))
    run.add("knn", "knn_search", "(N=8)", "fwd", 1, _timings(memcore=2.0, eager=9.0, faiss=1.4, reads=0.5))
    run.rows[0].update(gate="1.5x faiss", passed=False)
    head, _, line, one = rows.markdown(run.rows).splitlines()[:4]
    assert head == "| the K nearest keys | of | memcore, ms | eager, ms | faiss, ms | products, ms | reads, ms | vs eager | vs faiss | gate | met |"
    assert line.endswith(" | 1e+03 |  | 4.5x | 0.7x | 1.5x faiss | NO |") and " |  | 500 | 4.5x |" in one


def test_a_gate_below_the_least_is_told(run):
    run.add("ops", "read", "s", "fwd", 1, _timings(memcore=1.5, eager=1.9, least=1.0), gate=Gate(2))
    run.add("ops", "read", "t", "fwd", 1, _timings(memcore=1.5, eager=2.1, least=1.0), gate=Gate(2))
    head, _, below, above = rows.markdown(run.rows).splitlines()[:4]
    assert below.endswith(" | 2x eager | NO: below the least |") and above.endswith(" | 2x eager | NO |")
    assert below.split(" | ")[head.split(" | ").index("least, ms")] == "1e+03"


def test_older_rows_tell_the_least_in_bytes(run):
    run.add("ops", "read", "s", "fwd", 1, _timings(memcore=1.0, eager=1.9), gate=Gate(2))
    run.rows[0]["least_bytes"] = 10**9
    run.add("roofline", "read", "s", "L3", 1, _timings(eager=1.0), bytes=1e9)
    run.add("roofline", "aten call", "(8)", "fwd", 1, _timings(eager=1e-6))
    for row in run.rows:
        row["cpu"] = "a CPU"
    assert rows.markdown(run.rows).splitlines()[2].endswith(" | 2x eager | NO: below the least |")


def test_the_least_is_passes_over_large_tensors_or_one_call():
    def calls(call):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            call()
        found = [e for e in seen.events() if e.name.startswith("aten::") and e.name not in ("aten::fill_", "aten::detach", "aten::as_strided")]
        return [(e.name.removeprefix("aten::"), 4 * e.input_shapes[0][0]) for e in found]  # bytes

    mib = 1 << 20
    one, read, written = ("neg", 32), lambda n: ("sum", n * mib), lambda n: ("zero_", n * mib // 2)  # of what is written half
    assert calls(measure.least((mib, mib))) == [one]
    assert calls(measure.least((mib, mib), (mib, mib))) == [one, one]
    assert calls(measure.least((8 * mib, mib))) == [read(8)]
    assert calls(measure.least((8 * mib, 4 * mib))) == [read(8), written(4)]
    assert calls(measure.least((4 * mib, 0), (9 * mib, 5 * mib))) == [read(4), one, one, read(9), written(5)]


@pytest.mark.parametrize("op", [op for op, case in CASES.items() if case.unread])
def test_a_backward_has_no_need_of_what_it_does_not_read(op):
    case = CASES[op]
    inputs = case.inputs(SHAPES["tiny"])

    def grads(poison):
        out = cases.tuples(case.memcore()(*inputs))
        for i in case.unread if poison else ():
            inputs[i].data.fill_(torch.nan)
        return torch.autograd.grad(out, [inputs[i] for i in case.diff], [torch.ones_like(y) for y in out])

    for a, b in zip(grads(False), grads(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [512**2, 3 * 512**2, 2500 * 512**2])
def test_products_are_so_many_multiply_adds(count):
    with FlopCounterMode(display=False) as counter:
        measure.products(count)()
    assert counter.get_total_flops() == 2 * count


@pytest.mark.parametrize("kind", ["NTM", "MANN"])
def test_the_controllers_multiply_adds_are_those_of_pytorch(kind):
    case = StepCase(3, 2, 2 if kind == "MANN" else 1, 11, 7, 5, Gate())
    about = sequence_suite.MODELS[kind]
    made = sequence_suite.recurrences(case, ["floor"], kind=kind)["floor"]
    with FlopCounterMode(display=False) as counter:
        made.forward().backward(made.cotangent)
    first = 3 * (2 * 7 + 200) * 4 * 200 if kind == "MANN" else 0  # which starts from zeros, that need no gradient
    assert counter.get_total_flops() == 2 * (case.T * about.multiply_adds(replace(case, N=0)) - first)


@pytest.mark.parametrize("R, Hw", [(1, 1), (4, 1), (2, 3)])
def test_the_memorys_multiply_adds_are_the_products_of_eager_pytorch_norms_and_writes(R, Hw):
    """Norms and part of the writes are no matrix products there."""
    case, H = StepCase(3, R, Hw, 11, 7, 2, Gate()), R + Hw
    made = runner.step_variants(case, ["eager"])["eager"]
    with FlopCounterMode(display=False) as counter:
        made.both()
    products = counter.get_total_flops() // (2 * case.T * 3 * 11 * 7)
    assert products == 3 * (H + R) + (3 * Hw if Hw > 1 else 0)  # similarities and reads, and the sum of several heads' additions
    assert case.multiply_adds // (3 * 11 * 7) == 3 * (H + R) + 2 + 7 * Hw  # with norms and writes


def test_figures_are_drawn_from_the_rows(run, tmp_path):
    pytest.importorskip("matplotlib")
    from memcore.bench.plots import draw

    run.add("ops", "read", SHAPES["small"], "fwd", 1, _timings(memcore=1e-3, eager=2e-3, compile=1e-3), gate=Gate(2))
    run.add("train", "NTM", "copy B=1", "train step", 1, _timings(memcore=1e-3, eager=2e-3), gate=Gate(1.6))
    for row in run.rows:
        row.update(cpu="a CPU", torch="2", commit="c", date="d")
    rows.append(run.rows, tmp_path)
    drawn = draw(tmp_path)
    assert [p.name for p in drawn] == ["ops.png", "step.png"]
    assert all(p.stat().st_size > 5000 for p in drawn)


def test_an_exponent_is_the_power_that_fits():
    assert measure.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert measure.exponent([5, 10, 40], [7, 28, 448]) == pytest.approx(2)
    assert measure.exponent([2, 8], [9, 9]) == pytest.approx(0)


def _grown(run, axis, power, saved_power=1):
    """Rows of chains whose time and saved bytes grow with these powers of one size; memcore's alone is judged."""
    for n in (10, 20, 40):
        case = replace(STEPS["small"], **{axis: n})
        run.add(
            "growth", "ntm_step", case, f"fwd+bwd over {axis}", 1, _timings(memcore=1e-3 * n**power, eager=2e-3 * n),
            saved={"memcore": 100 * n**saved_power, "eager": 700 * n}, memory=100 * n,
        )  # fmt: skip
    return [r for r in run.rows if r["variant"] == "memcore"]


@pytest.mark.parametrize("axis", "BTNW")
def test_powers_are_those_of_the_rows(run, axis):
    assert rows.powers(_grown(run, axis, 1.5, 0.5), axis) == pytest.approx((1.5, 0.5))


def test_the_growth_table_has_a_line_for_each_size_of_the_newest_run(run):
    for row in _grown(run, "T", 3):  # an older run
        row["date"] = "before"
    run.rows[:] = [{**row, "date": "before"} for row in run.rows]
    _grown(run, "T", 1.2)
    _grown(run, "B", 1)
    run.rows[-2].update(gate="time, saved <= B^1.1", passed=True)
    lines = rows.markdown(run.rows).splitlines()
    assert lines[2:4] == [
        "| ntm_step (16,1/1,128,20) T=40 | T = 10, 20, 40 | 15.8, 36.4, 83.7 | T^1.20 (T^1.00) | T^1.00 (T^1.00) | 1.00 (7.00) |  |  |",
        "| ntm_step (40,1/1,128,20) T=40 | B = 10, 20, 40 | 10, 20, 40 | B^1.00 (B^1.00) | B^1.00 (B^1.00) | 1.00 (7.00) "
        "| time, saved <= B^1.1 | yes |",
    ]


@pytest.mark.growth
def test_growth_is_measured_and_judged(monkeypatch):
    monkeypatch.setattr(runner, "GROWTH", {"T": cases.GROWTH_QUICK["T"]})
    monkeypatch.setattr(runner, "CALLS", 10)
    run = runner.Run(scale=1e-3)
    runner.growth(run)
    chains = [r for r in run.rows if r["suite"] == "growth"]
    assert [(r["shape"], r["variant"]) for r in chains] == [(f"(2,1/1,16,8) T={n}", v) for n in (2, 4) for v in ("memcore", "eager")]
    ours = chains[::2]
    assert ours[0]["saved_memories"] == pytest.approx(ours[1]["saved_memories"], rel=0.1)  # a step keeps the same at any length
    assert [r["passed"] for r in ours] == [None, all(p <= cases.POWER for p in rows.powers(ours, "T"))]
    held = [r for r in run.rows if r["suite"] == "held"]
    assert [r["op"] for r in held] == [*CASES, "ntm_step", "NTM", "MANN"] and all(r["pass"].endswith(" 10 calls") for r in held)
    monkeypatch.setattr(runner, "POWER", 0.9)  # saved bytes alone grow faster
    monkeypatch.setattr(runner, "held", lambda run: None)
    run.rows.clear()
    runner.growth(run)
    assert [r["passed"] for r in run.rows if r["suite"] == "growth"] == [None, None, False, None]


def test_quick_growth_judges_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "GROWTH_QUICK", {"B": cases.GROWTH_QUICK["B"]})
    assert main(["growth", "--quick", "--op", "read", "--out", str(tmp_path)]) == 0
    (row,) = rows.read(tmp_path)
    assert (row["suite"], row["op"], row["pass"], row["gate"]) == ("held", "read", "fwd+bwd, 200 calls", None)
    assert "fwd+bwd, 200 calls" in capsys.readouterr().out


def test_fresh_leaves_malloc_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "tune_allocator", lambda: pytest.fail("malloc was told to keep memory"))
    monkeypatch.setattr(runner, "STEPS", {"small": cases.TINY_STEP})
    assert main(["fresh", "--quick", "--no-compile", "--no-naive", "--op", "read", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = rows.read(tmp_path)
    assert {(r["suite"], r["op"], r["pass"]) for r in found} == {("fresh", "read", "fwd"), ("fresh", "read", "fwd+bwd"), ("fresh", "ntm_step", "fwd+bwd")}
    assert {(r["allocator"], r["gate"]) for r in found} == {("malloc as it is", None)}
    assert "| malloc as it is, (B,H,N,W)" in rows.markdown(found)


needs_proc = pytest.mark.skipif(measure.resident() is None, reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("size", [10, 1000])
def test_held_bytes_are_those_of_a_leak(size):
    """Small ones and large ones, even where free blocks were at hand; the allocations of every call alone hold nothing. In a process of its own: what
    other tests have freed could hold the leak."""
    code = f"""
import torch
from memcore.bench import measure
free = [torch.ones(1000) for _ in range(5000)]
free.clear()
kept = []
print(measure.held_bytes(lambda: torch.ones({size}), 2000)[1], measure.held_bytes(lambda: kept.append(torch.ones({size})), 2000)[1])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    none, leaked = map(int, out.split())
    assert none < 2e5
    assert 2000 * 4 * size < leaked < 2000 * (4 * size + 1500)


@needs_proc
def test_an_operator_that_leaks_fails_its_gate(monkeypatch):
    kept = []
    right = memcore.functional.read

    def leaking(*args):
        kept.append(torch.ones(1000))  # more than what other tests have freed could hold
        return right(*args)

    run = runner.Run(only=("read", "interpolate"))
    monkeypatch.setattr(runner, "CALLS", 3000)
    monkeypatch.setattr(memcore.functional, "read", leaking)
    runner.held(run)
    interpolate, read = run.rows
    assert (interpolate["op"], interpolate["passed"], interpolate["pass"]) == ("interpolate", True, "fwd+bwd, 3,000 calls")
    assert (read["op"], read["passed"], read["gate"]) == ("read", False, "grown <= 1024 KiB")
    assert read["saved_bytes"] > 3000 * 400
    assert "| fwd+bwd, 3,000 calls | 1 |" in rows.markdown(run.rows) and "gates met: 1 of 2" in rows.text(run.rows)


def test_rows_of_an_older_version_are_read(tmp_path):
    (tmp_path / rows.CSV).write_text("suite,op,ms_median\nops,read,2.5\n")
    (row,) = rows.read(tmp_path)
    assert row == {**dict.fromkeys(rows.FIELDS), "suite": "ops", "op": "read", "ms_median": 2.5}
    rows.append([{**row, "op": "sharpen", "recall": 0.5}], tmp_path)
    old, new = rows.read(tmp_path)
    assert old == row and new == {**row, "op": "sharpen", "recall": 0.5}


def test_approximate_indices_keep_the_newest_entries_and_find_most_neighbours(run):
    pytest.importorskip("faiss")
    keys = torch.randn(2000, bench_store.D, generator=torch.Generator().manual_seed(1))
    for index, recall in bench_store._indices(run, keys):
        assert bench_store.RECALL <= recall <= 1, index.name
        first, far = keys[:1].numpy(), torch.full((1, bench_store.D), 9.0).numpy()
        assert index.search(first)[0, 0] == 0
        index.write(far)  # the oldest entry leaves
        assert index.search(far)[0, 0] == 2000 and 0 not in index.search(first), index.name


def test_foreign_columns_are_refused(run, tmp_path):
    (tmp_path / rows.CSV).write_text("a,b\n1,2\n")
    run.add("ops", "read", "s", "fwd", 1, _timings(memcore=1.0))
    with pytest.raises(ValueError, match="must have the columns of this version, got a, b"):
        rows.append(run.rows, tmp_path)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["speed"], "'SUITE' must be one of roofline, ops, fresh, step, sequence, train, growth, store, knn, table, plot, got 'speed'"),
        (["fresh", "ops"], "'fresh' must be the only suite, since it leaves malloc as it is, got fresh ops"),
        (["fresh", "--size", "small"], "'--size' must be mid or large for 'fresh', got small"),
        (["ops", "--device", "xpu"], "'--device' must be cpu, .*, got 'xpu'"),
        (["ops", "--threads", "0"], "'--threads' must be numbers >= 1"),
        (["ops", "--time", "0"], "'--time' must be > 0, got 0"),
    ],
)
def test_bad_arguments_are_told(argv, message):
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_no_rows_yet(tmp_path):
    with pytest.raises(FileNotFoundError, match="make them with: memcore bench"):
        main(["table", "--out", str(tmp_path)])


def test_a_base_revision_is_compared_row_by_row(run):
    run.add("ops", "read", "s", "fwd", 1, _timings(memcore=1e-3, eager=4e-3))
    now = list(run.rows)
    run.rows.clear()
    run.add("ops", "read", "s", "fwd", 1, _timings(memcore=3e-3, eager=2e-3))
    assert base.ratios(run.rows, now).splitlines()[1].split() == ["read", "s", "float32", "fwd", "1", "3", "1", "3.00x", "6.00x"]


def test_an_unknown_base_is_told():
    with pytest.raises(ValueError, match="'--base' must be a revision of the git checkout at .*, got 'no-such-revision'"):
        base.measure_base("no-such-revision", [], print)
