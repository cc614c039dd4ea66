"""Which kernel a GPU tensor gets, without a GPU: the registered choosers are called on CPU tensors, Triton's launches are recorded, the
CUDA kernels run on the shim. Also what is said when something is missing, and fake CUDA tensors through every operator."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import shim_build
import torch
from torch._subclasses import FakeTensorMode

import memcore
from as_cuda import as_cuda
from cases import CASES, as_tuple, assert_close, case
from contract import expected, run
from memcore import _backend
from memcore.kernels import _cuda

GPU_OPERATORS = sorted(_backend._triton_files | set(shim_build.operators()))
SHAPES = {"rows": (3, 20, 0), "block": (3, 20, 7), "tiles": (2, 1000, 64), "vast": (300, 1000, 64)}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(shim_build.compiler() is None, reason="no C++ compiler for the CUDA kernels")


@pytest.fixture(autouse=True)
def both(monkeypatch):
    """A build with CUDA kernels and an installed triton, whatever is here."""
    monkeypatch.setattr(_backend, "_missing", {"native": "", "triton": ""})
    monkeypatch.setattr(_backend, "_native_gpu", frozenset(GPU_OPERATORS))
    monkeypatch.setattr(_backend, "_triton_files", frozenset(GPU_OPERATORS))
    monkeypatch.setattr(_backend, "_on_gpu", frozenset(GPU_OPERATORS))
    monkeypatch.setattr(_backend, "_unusable", {})
    monkeypatch.setattr(_backend, "_told", set())


def call(shape, dtype=torch.float32, **sizes):
    B, N, W = SHAPES[shape]
    return _backend.Call(dtype, torch.device("cuda", 0), sizes.get("B", B), sizes.get("N", N), sizes.get("W", W))


# (registered operator, shape) for every operator with kernels.
NAMES = [
    (name, shape)
    for name in sorted(_cuda.choosers)
    if _backend.operator(name) in GPU_OPERATORS
    for shape in (("rows",) if _backend.operator(name) in _backend.ROWS else ("block", "tiles", "vast"))
]
TRITON_OPERATORS, CUDA_OPERATORS = _backend._triton_files, frozenset(shim_build.operators())


# The table ------------------------------------------------------------------------------------------------------------


def test_every_operator_has_its_place_at_key_cuda():
    for c in CASES:
        for name in (f"{c.name}_fwd", *([f"{c.name}_bwd"] if c.differentiable else [])):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"memcore::{name}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("memcore::erase_add_write_", "CUDA")


@pytest.mark.parametrize("name, shape", NAMES)
def test_auto_follows_the_table(name, shape, monkeypatch):
    c = call(shape)
    assert c.shape == shape
    first = _backend.preference(name, shape).first
    other = {"native": "triton", "triton": "native"}[first]
    assert _backend.gpu_order(name, c) == (first, other, "reference")
    assert _backend.gpu_order(name, call(shape, torch.float64)) == ("reference",)
    monkeypatch.setattr(_backend, "_missing", {first: "is not here", other: ""})
    assert _backend.gpu_order(name, c) == (other, "reference")
    monkeypatch.setattr(_backend, "_missing", {first: "is not here", other: "neither"})
    assert _backend.gpu_order(name, c) == ("reference",)


def test_the_table_names_every_operator_and_gives_reasons():
    for name, shape in NAMES:
        assert len(_backend.preference(name, shape).reason.split()) > 8
    known = {*_cuda.choosers, *map(_backend.operator, _cuda.choosers)}
    assert all(n in known for p in _backend.GPU_TABLE for n in p.operators)


def test_what_the_kernels_refuse():
    assert _backend.gpu_order("read_fwd", call("tiles", W=8193)) == ("native", "reference")
    assert _backend.gpu_order("read_fwd", call("tiles", N=2_000_000_001)) == ("reference",)
    assert _backend.gpu_order("usage_update_fwd", call("rows")) == ("reference",)
    for choice, said, c in (
        ("triton", "Triton kernels take float32, bfloat16 and float16 tensors, got float64", call("block", torch.float64)),
        ("native", "CUDA kernels take float32, bfloat16 and float16 tensors, got float64", call("block", torch.float64)),
        ("triton", "Triton kernels take slots of up to 8192 numbers, got 8193", call("tiles", W=8193)),
        ("native", "CUDA kernels take sizes up to 2000000000, got 2000000001", call("tiles", N=2_000_000_001)),
    ):
        with memcore.backend(choice), pytest.raises(RuntimeError, match=f"memcore.read: backend '{choice}' is not available for cuda tensors: {said}"):
            _backend.gpu_order("read_fwd", c)
    for K, order in ((1024, ("native", "triton", "reference")), (1025, ("reference",))):
        assert _backend.gpu_order("knn_lookup_fwd", call("tiles")._replace(K=K)) == order
    with memcore.backend("triton"):
        assert _backend.gpu_order("read_fwd", call("tiles")) == ("triton",)
    with memcore.backend("reference"):
        assert _backend.gpu_order("read_fwd", call("tiles")) == ("reference",)


@needs_triton
def test_limits_are_those_of_the_kernels():
    from memcore.kernels import _triton

    assert (_backend.BLOCK, _backend.WIDEST) == (_triton.sizes.whole, _triton.sizes.width)
    step = (shim_build.CUDA / "ntm_step.h").read_text()
    assert f"constexpr int64_t kWhole = {_backend.BLOCK};" in step  # where ntm_step begins to go by tiles


# What runs ------------------------------------------------------------------------------------------------------------


class Ran:
    """Which backend was asked; the kernels themselves are replaced."""

    def __init__(self, monkeypatch, fails=None):
        self.asked, self.fails = [], fails or {}

        def kernel(backend, name):
            def f(*args):
                self.asked.append((backend, name))
                if backend in self.fails:
                    raise self.fails[backend]
                return f"{backend} result"

            return f

        monkeypatch.setattr(_cuda, "_kernel", kernel)


@pytest.mark.parametrize("name, shape", NAMES)
def test_the_chooser_calls_what_the_table_says(name, shape, monkeypatch):
    ran = Ran(monkeypatch)
    first = _backend.preference(name, shape).first
    assert _cuda.choosers[name](*arguments(name, shape)) == f"{first} result"
    for choice in ("native", "triton"):
        with memcore.backend(choice):
            assert _cuda.choosers[name](*arguments(name, shape)) == f"{choice} result"
    assert ran.asked == [(first, name), ("native", name), ("triton", name)]


def arguments(name, shape, device="cpu"):
    """Arguments of a registered operator, empty tensors of the right shapes."""
    B, N, W = SHAPES[shape]
    H = 2
    known = {
        "memory": (B, N, W), "key": (B, H, W), "word": (B, H, W), "erase": (B, H, W), "add": (B, H, W), "strength": (B, H), "gate": (B, H),
        "gamma": (B, H), "shift": (B, H, 3), "usage": (B, N), "interface": (B, H * (W + 6) + 2 * W), "mask": None,
        "query": (B, W), "keys": (N, W), "values": (N, 4), "count": None, "norms": None, "mirror": None, "rounding": None,
    }  # fmt: skip
    values = []
    for a in getattr(torch.ops.memcore, name).default._schema.arguments:
        if "Tensor" not in str(a.type):
            values.append(True if str(a.type) == "bool" else 1)
        elif a.name == "saved_0":
            values.append(torch.zeros(B, 1, dtype=torch.int64, device=device))
        elif a.name in known:
            values.append(known[a.name] and torch.empty(known[a.name], device=device))
        else:
            values.append(None if a.name.startswith("grad_") else torch.empty(B, H, N, device=device))
    return values


def test_row_sparse_gradients_go_to_what_took_the_search(monkeypatch):
    """Whatever is asked for by then."""
    asked = []

    def kernel(backend, name):
        return lambda grad, indices, query, keys, metric: asked.append((backend, name)) or (query.clone(), indices.new_empty(1, 0), keys.new_empty(0, 2))

    def backward(k=3):
        rows, cuda = torch.ops.memcore.knn_search_rows.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        rows.redispatch(cuda, None, torch.zeros(1, k, dtype=torch.int64), torch.zeros(1, 2), torch.zeros(5, 2), 0)

    def takes(K):
        return _backend.rows_order("knn_search_fwd", call("tiles")._replace(K=K))

    monkeypatch.setattr(_cuda, "_kernel", kernel)
    for choice, order in (("auto", ("native", "triton")), ("native", ("native",)), ("triton", ("triton",)), ("reference", ())):
        with memcore.backend(choice):
            assert takes(1024) == order and takes(1025) == ()
            backward()
    monkeypatch.setattr(_backend, "_missing", {"native": "is not here", "triton": ""})
    assert takes(1) == ("triton",)
    backward()
    assert asked == [(b, "knn_search_rows") for b in ("native", "native", "triton", "native", "triton")]
    with pytest.raises(RuntimeError, match="memcore.knn_search: no kernel for row-sparse gradients"):
        backward(1025)


NO_IMAGE = RuntimeError("memcore.read: CUDA error: no kernel image is available for execution on the device")


def test_a_build_that_does_not_fit_the_card_goes_on_with_triton(monkeypatch, caplog):
    ran = Ran(monkeypatch, {"native": NO_IMAGE})
    with caplog.at_level(logging.WARNING, "memcore"):
        for _ in range(3):
            assert _cuda.choosers["read_fwd"](*arguments("read_fwd", "block")) == "triton result"
    assert ran.asked == [("native", "read_fwd"), *[("triton", "read_fwd")] * 3]
    assert len(caplog.records) == 1 and "go on without native kernels" in caplog.text and "no kernel image" in caplog.text
    assert "no kernel image" in str(_backend.describe()["gpu"]["unusable"])


def test_a_triton_that_does_not_import_goes_on_with_native(monkeypatch, caplog):
    ran = Ran(monkeypatch, {"triton": ImportError("libtriton.so: cannot open")})
    with caplog.at_level(logging.WARNING, "memcore"):
        for _ in range(3):
            assert _cuda.choosers["read_fwd"](*arguments("read_fwd", "tiles")) == "native result"
    assert ran.asked == [("triton", "read_fwd"), *[("native", "read_fwd")] * 3]
    assert len(caplog.records) == 1 and "libtriton.so" in caplog.text


def test_other_errors_are_not_hidden(monkeypatch):
    Ran(monkeypatch, {"native": RuntimeError("memcore.read: CUDA error: an illegal memory access was encountered")})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _cuda.choosers["read_fwd"](*arguments("read_fwd", "block"))
    Ran(monkeypatch, {"native": NO_IMAGE})
    with memcore.backend("native"), pytest.raises(RuntimeError, match="no kernel image"):
        _cuda.choosers["read_fwd"](*arguments("read_fwd", "block"))
    with memcore.backend("native"), pytest.raises(RuntimeError, match="'native' is not available for cpu tensors: the CUDA kernels do not run on"):
        _cuda.choosers["read_fwd"](*arguments("read_fwd", "block"))


# What is missing ------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "missing, takes, said",
    [
        ({"native": "", "triton": ""}, True, None),
        ({"native": "built without", "triton": ""}, True, "memcore runs GPU tensors on Triton kernels alone: built without"),
        ({"native": "", "triton": "not installed"}, True, "memcore runs GPU tensors on CUDA C++ kernels alone: not installed"),
        ({"native": "built without", "triton": "not installed"}, False, "memcore runs GPU tensors on plain PyTorch: built without; not installed"),
    ],
)
def test_what_is_missing_is_told_once(missing, takes, said, monkeypatch, caplog):
    monkeypatch.setattr(_backend, "_missing", missing)
    with caplog.at_level(logging.WARNING, "memcore"):
        for op in ("read", "sharpen", "usage_update"):
            assert _backend.takes_kernel(op, GPU) == (takes and op != "usage_update")
    assert [r.getMessage() for r in caplog.records] == ([said] if said else [])
    for choice, reason in missing.items():
        with memcore.backend(choice):
            if reason:
                with pytest.raises(RuntimeError, match=f"memcore.read: backend '{choice}' is not available for cuda tensors: {reason}"):
                    _backend.takes_kernel("read", GPU)
            else:
                assert _backend.takes_kernel("read", GPU)
            with pytest.raises(RuntimeError, match="memcore.usage_update: backend '.*' is not available for cuda tensors"):
                _backend.takes_kernel("usage_update", GPU)


def test_reasons_for_what_is_missing(monkeypatch):
    monkeypatch.setattr(_backend, "native_gpu_registered", frozenset())
    monkeypatch.setattr(_backend, "native", object())
    assert "built without CUDA kernels" in _backend._gpu_missing()["native"]
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in _backend._gpu_missing()["native"]
    monkeypatch.setattr(_backend, "find_spec", lambda name: None)
    assert "not installed" in _backend._gpu_missing()["triton"]


def test_doctor_says_what_runs_on_gpus(monkeypatch):
    from memcore import doctor

    assert doctor._on_gpu("read", _backend.describe()) == "native (block) and triton (tiles, vast)"
    assert doctor._on_gpu("erase_add_write", _backend.describe()) == "native (block, tiles forward) and triton (tiles backward, vast)"
    assert doctor._on_gpu("sharpen", _backend.describe()) == "native"
    assert doctor._on_gpu("least_used", _backend.describe()) == "plain PyTorch (no GPU kernel of it)"
    monkeypatch.setattr(_backend, "_missing", {"native": "built without", "triton": ""})
    assert doctor._on_gpu("read", _backend.describe()) == "triton"
    assert "missing: built without" in doctor.text(doctor.examine())
    with memcore.backend("native"):
        assert doctor._on_gpu("read", _backend.describe()) == "refused (built without)"
    monkeypatch.setattr(_backend, "_missing", {"native": "built without", "triton": "not installed"})
    assert doctor._on_gpu("read", _backend.describe()) == "plain PyTorch (built without; not installed)"


# The kernels themselves -----------------------------------------------------------------------------------------------


@pytest.fixture
def shim():
    import cuda_shim

    cuda_shim.load()
    if not hasattr(torch.ops.memcore, "_erase_add_write__cuda"):
        cuda_shim._definitions.define("_erase_add_write__cuda(Tensor(a!) memory, Tensor weights, Tensor erase, Tensor add) -> ()")
    return cuda_shim


@needs_compiler
@pytest.mark.parametrize("op", [c.name for c in CASES if c.name in GPU_OPERATORS])
def test_native_kernels_through_the_dispatcher(op, shim):
    """Values and gradients of first and second order; float64 by the reference."""
    c = case(op)
    sample = c.samples[0]
    x = c.inputs(sample, torch.float32)
    with shim.recorded() as launches:  # nothing runs, but everything is there
        with as_cuda() as calls:
            run(c.function, c, sample, x)
        assert calls == [f"{op}_fwd", f"{op}_bwd"] and len(launches) >= 2
    with as_cuda("native"):
        ys, grads = run(c.function, c, sample, x)
    wanted, wanted_grads = expected(c, sample, torch.float32)
    for y, e in zip(ys, wanted, strict=True):
        assert_close(y, e, dtype=torch.float32, **c.tolerance(sample, x), what="output")
    for k, e in wanted_grads.items():
        assert_close(grads[k], e, dtype=torch.float32, **c.tolerance(sample, x, backward=True), what=f"gradient of {k}")
    leaves = {k: v.clone().requires_grad_() if k in c.differentiable and v is not None else v for k, v in x.items()}
    tracked = [leaves[k] for k in c.differentiable if leaves[k] is not None]

    def twice(f):
        first = torch.autograd.grad(sum((y**2).sum() for y in as_tuple(f(**leaves, **sample.options))), tracked, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), tracked, allow_unused=True, materialize_grads=True)

    with as_cuda("native"):
        second = twice(c.function)
    for a, e in zip(second, twice(c.reference), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-3, atol=2e-4 * max(1.0, e.abs().max().item()))
    with as_cuda("auto") as calls:
        double = c.function(**c.inputs(sample, torch.float64), **sample.options)
    assert calls == [f"{op}_fwd"] and as_tuple(double)[0].dtype == torch.float64


@needs_compiler
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "with_gaps"])
def test_native_in_place(gaps, shim):
    c = case("erase_add_write")
    x = c.inputs(c.samples[0], torch.float32)
    wanted = c.reference(**x)
    memory = x["memory"].transpose(1, 2).contiguous().transpose(1, 2) if gaps else x["memory"]
    address, version = memory.data_ptr(), memory._version
    with as_cuda("native") as calls:
        out = memcore.functional.erase_add_write_(memory, x["weights"], x["erase"], x["add"])
    assert calls == ["erase_add_write_"]
    assert out is memory and memory.data_ptr() == address and memory._version > version
    torch.testing.assert_close(memory, wanted)


def launches(name, shape, shim):
    """{backend: [blocks of each launch]} of one call; nothing runs."""
    from memcore.kernels import _triton

    found = {}
    with shim.recorded() as native, memcore.backend("native"):
        _cuda.choosers[name](*arguments(name, shape))
    found["native"] = [n.blocks for n in native]
    triton = []
    with _triton.launching(lambda launch: triton.append(launch.grid[0])), memcore.backend("triton"):
        _cuda.choosers[name](*arguments(name, shape))
    found["triton"] = triton
    return found


MEASURED = json.loads((Path(__file__).resolve().parents[2] / "results" / "gpu" / "h200" / "kernels.json").read_text())["us"]


def measured(name, shape):
    """{backend: microseconds} of this direction's kernels at the measured sizes of the class, {sizes: ...}."""
    op, way = _backend.operator(name), "bwd" if name.endswith("_bwd") else "fwd"
    found = {}
    for text, by in MEASURED.get(op, {}).items():
        B, H, N, W = map(int, text.strip("()").split(","))
        if _backend.Call(torch.float32, torch.device("cuda", 0), B, N, 0 if op in _backend.ROWS else W).shape != shape:
            continue
        # Sums of tiles belong to the backward in all but a read's forward; the similarities to both.
        of = lambda kernel: way in kernel or ("bwd" not in kernel and "fwd" not in kernel and way == "fwd")  # noqa: E731
        found[text] = {b: sum(t for k, t in kernels.items() if of(k)) for b, kernels in by.items()}
    return found


@pytest.mark.parametrize("name, shape", NAMES)
def test_the_table_follows_the_measurement(name, shape):
    """The chosen backend's kernels were the faster ones on the GPU, or the reason says what is saved on the host."""
    first = _backend.preference(name, shape)
    other = {"native": "triton", "triton": "native"}[first.first]
    for sizes, us in measured(name, shape).items():
        assert us[first.first] <= us[other] or "Python" in first.reason, (sizes, us)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("name, shape", NAMES)
def test_launches(name, shape, shim):
    """A small memory takes one launch of a native kernel, and no fewer of Triton's; past a block its steps spread over tiles, as Triton's operators do."""
    if _backend.operator(name) not in TRITON_OPERATORS & CUDA_OPERATORS:
        pytest.skip("kernels of one kind alone")
    found, B = launches(name, shape, shim), SHAPES[shape][0]
    if name.startswith("knn"):
        assert len(found["native"]) == len(found["triton"])
    elif name.startswith("ntm_step") and shape != "block":
        assert len(found["native"]) == {"fwd": 4, "bwd": 6}[name[-3:]] and max(found["native"]) > 2 * B
    else:
        assert len(found["native"]) == 1 <= len(found["triton"])
        if shape == "tiles" and _backend.preference(name, shape).first == "triton":
            assert max(found["native"]) == B < max(found["triton"])


# Fake tensors ---------------------------------------------------------------------------------------------------------
#
# A torch built without CUDA aborts where autograd meets a fake CUDA tensor (`torch.empty(3, device="cuda", requires_grad=True) * 2`):
# these tests stay below autograd; the tests above have it. It refuses to index one, too, as least_used and split_interface do.

FAKES = [c for c in CASES if c.name in GPU_OPERATORS or c.name == "usage_update"]


def fake_inputs(mode, c, dtype=torch.float32):
    x = c.inputs(c.samples[0], dtype)
    with mode:
        return {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") if isinstance(v, torch.Tensor) else v for k, v in x.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("c", FAKES, ids=repr)
def test_fake_cuda_tensors(c, dtype):
    """Shapes and dtypes of tensors on a GPU that is not there."""
    sample, mode = c.samples[0], FakeTensorMode()
    x = fake_inputs(mode, c, dtype)
    with mode:
        ys = as_tuple(c.function(**x, **sample.options))
    for y, e in zip(ys, as_tuple(c.reference(**c.inputs(sample, dtype), **sample.options)), strict=True):
        assert (y.shape, y.dtype, y.device.type) == (e.shape, e.dtype, "cuda")


@pytest.mark.parametrize("name", sorted({name for name, _ in NAMES if name.endswith("_bwd")}))
def test_backwards_on_fake_cuda_tensors(name):
    with FakeTensorMode():
        args = arguments(name, "rows" if _backend.operator(name) in _backend.ROWS else "block", "cuda")
        outs = as_tuple(getattr(torch.ops.memcore, name).default(*args))
    given = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
    assert all(o.device.type == "cuda" and tuple(o.shape) in given for o in outs)


@pytest.mark.parametrize("c", FAKES, ids=repr)
def test_compile_for_fake_cuda_tensors(c):
    """One graph, which holds the operator itself where it has kernels."""
    torch._dynamo.reset()
    sample, mode, graphs = c.samples[0], FakeTensorMode(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x = fake_inputs(mode, c)
    with mode:
        y = as_tuple(torch.compile(c.function, fullgraph=True, backend=keep)(**x, **sample.options))
    assert all(t.device.type == "cuda" for t in y) and len(graphs) == 1
    called = {str(n.target) for n in graphs[0].graph.nodes if "memcore" in str(n.target)}
    assert called == ({f"memcore.{c.name}_fwd.default"} if c.name in GPU_OPERATORS else set())
