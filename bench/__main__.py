"""`memcore bench`: measure memcore against eager PyTorch and torch.compile on this machine."""

import argparse
import json
import re
import sys
from collections.abc import Sequence

from .._stdio import quiet_pipe

__all__ = ["main"]

SUITES = ("roofline", "ops", "fresh", "step", "sequence", "train", "growth", "store", "knn")
EPILOG = """what runs:
  roofline  read bandwidth of L2, L3, DRAM; float32 matrix products; one aten call (half a minute)
  ops       every operator at three sizes, forward and forward + backward
  fresh     operators on whole memories and ntm_step, mid and large, without telling malloc to keep what is freed; runs by itself
  step      ntm_step chained from Python, forward and backward through time, at three sizes; the cost of a call
  train     a whole training step of an NTM on copy, batch 1, 16, 64, Adam included
  sequence  an NTM over a whole sequence, controller included, at three sizes; its time and saved bytes against B, N, W and T
  growth    how ntm_step's time and saved bytes grow with B, T, N, W; what 10,000 calls of every operator leave in memory
  store     memcore.DND's lookup, write and both as N grows, against a ring in PyTorch and faiss where it is installed
  knn       exact search of the 50 nearest keys and its backward, against PyTorch and faiss, on Gaussian keys, SIFT, MNIST, Omniglot; --size is N
  table     Markdown tables of the newest rows          plot      figures of the newest rows

variants: memcore; eager (tuned PyTorch); compile (the same under torch.compile); vectorised (of a step: formula by
formula, all heads at once); naive (as commonly written, context only).
Every variant is first checked against memcore.reference: nothing wrong is timed. One process, variants interleaved round by round,
CPU seconds at one thread, wall seconds at more; ops and train show compile at one thread only. Gates hold at one thread;
growth measures nothing else.
Rows are appended to rows.csv and rows.jsonl in --out.

examples:
  memcore bench ops step sequence train growth     everything, about 20 minutes on two quiet cores
  memcore bench ops --op read --op sharpen --no-compile
  memcore bench step --size small --quick
  memcore bench step --base HEAD~3        the same with an earlier revision beside it (checkout only)
  memcore bench train step sequence knn ops --device cuda      on a GPU, timed by events, against eager, compile and eager in a CUDA graph; gpu.json in --out"""


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


_counts.__name__ = "comma-separated numbers"


def _parser() -> argparse.ArgumentParser:
    from .cases import CASES

    parser = argparse.ArgumentParser(
        prog="memcore bench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; or table; or plot (default: ops with --op)")
    parser.add_argument("--op", action="append", default=[], choices=tuple(CASES), metavar="OP", help=f"only this operator; repeatable: {', '.join(CASES)}")
    parser.add_argument("--size", action="append", choices=("small", "mid", "large", "huge"), help="only this size of ops and step; repeatable")
    parser.add_argument("--batch", type=_counts, default=(1, 16, 64), metavar="1,16,64", help="batch sizes of train")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32", help="of ops (default: float32)")
    parser.add_argument("--threads", type=_counts, default=(1, 2), metavar="1,2", help="thread counts (default: 1,2)")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs")
    parser.add_argument("--time", type=float, default=1.0, metavar="X", help="measure X times as long (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-naive", action="store_true", help="leave the vectorised and the commonly written form out")
    parser.add_argument("--quick", action="store_true", help="a few rounds at the least sizes: does it run? Nothing is kept without --out")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N; a GPU has suites ops, step, sequence, train and knn, and a size huge")
    parser.add_argument("--out", metavar="DIR", help="folder of the rows (default: bench/results of a checkout, else ./bench-results)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--plot", action="store_true", help="draw the figures afterwards")
    parser.add_argument("--base", metavar="REF", help="measure this git revision too, in a work tree of its own, and print the ratios")
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout, the tables on stderr")
    return parser


def _check(args: argparse.Namespace) -> list[str]:
    suites = args.suites or (["ops"] if args.op else [])
    known = (*SUITES, "table", "plot")
    for name in suites:
        if name not in known:
            raise ValueError(f"memcore bench: 'SUITE' must be one of {', '.join(known)}, got {name!r}")
    if "fresh" in suites and set(suites) & set(SUITES) != {"fresh"}:
        raise ValueError(f"memcore bench: 'fresh' must be the only suite, since it leaves malloc as it is, got {' '.join(suites)}")
    if "fresh" in suites and args.size and not {"mid", "large"} & set(args.size) and not args.quick:
        raise ValueError(f"memcore bench: '--size' must be mid or large for 'fresh', got {' '.join(args.size)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"memcore bench: '--device' must be cpu, cuda or cuda:N, got {args.device!r}")
    if args.device == "cpu" and "huge" in (args.size or ()):
        raise ValueError("memcore bench: '--size' must be small, mid or large on the CPU, got 'huge'")
    if args.device != "cpu" and args.base is not None:
        raise ValueError(f"memcore bench: '--base' must not be given with --device {args.device}")
    for name, values in (("--threads", args.threads), ("--batch", args.batch)):
        if not values or min(values) < 1:
            raise ValueError(f"memcore bench: {name!r} must be numbers >= 1, got {values}")
    if not args.time > 0:
        raise ValueError(f"memcore bench: '--time' must be > 0, got {args.time}")
    return suites


def _again(args: argparse.Namespace, suites: Sequence[str]) -> list[str]:
    """The same measurements as options: memcore and eager alone."""
    again = [*suites, "--no-compile", "--no-naive", *(["--quick"] if args.quick else [])]
    for name in ("op", "size"):
        for value in getattr(args, name) or ():
            again += [f"--{name}", value]
    for name in ("batch", "threads"):
        again += [f"--{name}", ",".join(map(str, getattr(args, name)))]
    return [*again, "--dtype", args.dtype, "--seed", str(args.seed), "--time", str(args.time)]


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run `memcore bench`; returns the exit code.

    Raises:
        ValueError, OSError: for arguments or folders that cannot be used.
    """
    parser = _parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    suites = _check(args)
    if not suites:
        parser.print_help()
        return 2

    import torch

    from . import rows, runner

    folder = args.out or rows.default_folder()
    if args.device != "cpu":
        from . import gpu

        keep = not args.no_save and (not args.quick or args.out is not None)
        gpu.main(args, suites, folder if keep else None)
        return 0
    measured = [s for s in suites if s in SUITES]
    if measured:
        variants = ["memcore", "eager"] + ["compile"] * (not args.no_compile) + ["vectorised", "naive"] * (not args.no_naive)
        run = runner.Run(
            threads=args.threads,
            variants=tuple(variants),
            only=tuple(args.op),
            sizes=tuple(args.size or (("small",) if args.quick else ("small", "mid", "large"))),
            batches=args.batch[:1] if args.quick else args.batch,
            dtype=getattr(torch, args.dtype),
            seed=args.seed,
            scale=args.time,
            quick=args.quick,
            keep_freed="fresh" not in measured,
        )
        keep = not args.no_save and (not args.quick or args.out is not None)
        for suite in measured:
            before = len(run.rows)
            getattr(runner, suite)(run)
            if keep:  # suite by suite: an interrupted run keeps what it has
                rows.append(run.rows[before:], folder)
        print(rows.text(run.rows), file=sys.stderr if args.json else sys.stdout)
        if args.json:
            print(json.dumps(run.rows, indent=1))
        if args.base is not None:
            from . import base

            before = base.measure_base(args.base, _again(args, measured), run.say)
            print(base.ratios(before, run.rows), file=sys.stderr if args.json else sys.stdout)
    if "table" in suites:
        print(rows.markdown(rows.read(folder)))
    if "plot" in suites or args.plot:
        from .plots import draw

        for path in draw(folder):
            print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        if not str(e).startswith("memcore") and not isinstance(e, (ValueError, OSError)):
            raise
        print(f"memcore: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
