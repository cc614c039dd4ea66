"""The `memcore` command: parsing and printing only; the work is done in memcore.train, memcore.data, memcore.bench and friends.

Exit codes: 0 done, 1 the run itself failed (it diverged), 2 bad input (one sentence on stderr), 130 / 143 stopped by Ctrl-C / SIGTERM,
141 nobody reads the output any more (`| head`).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ._stdio import quiet_pipe

__all__ = ["main"]

TASKS = ("copy", "repeat-copy", "associative-recall", "dynamic-ngrams", "priority-sort", "priority-sort-small", "omniglot")

# flag -> (argument of the model, models that have it, add_argument settings)
MODEL_FLAGS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "--slots": ("memory_slots", ("ntm", "mann"), {"type": int, "metavar": "N", "help": "memory slots (papers: 128)"}),
    "--width": ("slot_width", ("ntm", "mann"), {"type": int, "metavar": "W", "help": "width of a slot (NTM paper: 20; MANN: 40)"}),
    "--read-heads": ("read_heads", ("ntm", "mann"), {"type": int, "metavar": "R", "help": "read heads (NTM paper: 1 to 8 by task; MANN: 4)"}),
    "--write-heads": ("write_heads", ("ntm",), {"type": int, "metavar": "H", "help": "write heads (as many as read heads in the paper)"}),
    "--shift-width": ("shift_range", ("ntm",), {"type": int, "metavar": "S", "help": "allowed shifts, odd (paper: 3, offsets -1, 0, +1)"}),
    "--controller": ("controller", ("ntm",), {"choices": ("lstm", "feedforward"), "help": "controller (paper: both)"}),
    "--controller-size": ("controller_size", ("ntm", "mann"), {"type": int, "metavar": "K", "help": "controller width (NTM paper: 100; MANN: 200)"}),
    "--controller-layers": ("controller_layers", ("ntm",), {"type": int, "metavar": "L", "help": "controller layers (paper: 1; sort: 2)"}),
    "--controller-clip": ("controller_clip", ("ntm",), {"type": float, "metavar": "C", "help": "clip the controller's output to +-C (paper: none)"}),
    "--read-gate-bias": ("read_gate_bias", ("ntm",), {"type": float, "metavar": "X", "help": "where the read heads' gates start (-2: keep)"}),
    "--memory-init": ("memory_init", ("ntm",), {"choices": ("constant", "learned", "random"), "help": "first memory (constant 1e-6)"}),
    "--first-weighting": ("first_weighting", ("ntm",), {"choices": ("learned", "onehot", "uniform"), "help": "first weightings (learned)"}),
    "--order": ("order", ("ntm", "mann"), {"choices": ("write_read", "read_write"), "help": "order within a step (write_read)"}),
    "--decay": ("decay", ("mann",), {"type": float, "metavar": "G", "help": "decay of the usage (0.95; paper: 0.99)"}),
    "--strength": ("strength", ("mann",), {"type": float, "metavar": "S", "help": "of the read keys (paper: none, 1)"}),
    "--add": ("add", ("mann",), {"choices": ("key", "separate"), "help": "what is written (paper: the key)"}),
    "--written-slots": ("slots", ("mann",), {"choices": ("one", "n_shared", "per_head"), "help": "least-used slots written (one)"}),
    "--hidden-size": ("hidden_size", ("lstm",), {"type": int, "metavar": "K", "help": "width of the LSTM baseline (NTM paper: 128 to 512 by task)"}),
    "--layers": ("num_layers", ("lstm",), {"type": int, "metavar": "L", "help": "layers of the LSTM baseline (NTM paper: 3)"}),
}

TRAIN_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--steps": ("steps", {"type": int, "metavar": "N", "help": "updates in all"}),
    "--batch-size": ("batch_size", {"type": int, "metavar": "B", "help": "sequences an update (NTM paper: 1; MANN: 16)"}),
    "--optimizer": ("optimizer", {"choices": ("adam", "rmsprop"), "help": "rmsprop is the papers': Graves 2013, centred, decay .95, momentum .9"}),
    "--lr": ("lr", {"type": float, "metavar": "X", "help": "learning rate (paper: 1e-4; 3e-5 for n-grams and sort)"}),
    "--schedule": ("schedule", {"choices": ("constant", "cosine"), "help": "of the learning rate (paper: constant)"}),
    "--clip-norm": ("clip_norm", {"type": "bound", "metavar": "X", "help": "bound of the gradient's norm, or none"}),
    "--clip-value": ("clip_value", {"type": "bound", "metavar": "X", "help": "bound of each gradient element, or none (paper: 10)"}),
    "--keep": ("keep", {"choices": ("last", "best"), "help": "weights to end with: the last, or those with the lowest validation loss (last)"}),
    "--eval-every": ("eval_every", {"type": int, "metavar": "N", "help": "updates between rows of the learning curve (100)"}),
}

EXAMPLES = """examples:
  memcore train ntm --task copy                        until solved, minutes on one core
  memcore train ntm --task copy --baseline --seeds 0,1,2 --out runs/copy
                                                       three seeds, the LSTM beside them at equal updates
  memcore train mann --task omniglot --max-minutes 60  one-shot characters (needs: memcore data get omniglot)
  memcore train ntm --task copy --preset paper         the paper's own setting: batch 1, RMSProp 1e-4
  memcore train ntm --task copy --resume               go on where Ctrl-C stopped it, bit for bit
  memcore train nec --env CartPole-v1 --baseline       an agent with episodic memory, and a DQN for equally many steps
  memcore plot returns runs/CartPole-v1/*              return against steps, dictionaries, neighbours
  memcore eval runs/copy-ntm-seed0 --sequences 1000
  memcore plot curve runs/copy/*                       median and band over seeds
  memcore plot memory runs/copy-ntm-seed0 --set length=20
  memcore bench step                                   kernels against eager and torch.compile
  memcore doctor                                       what is installed, which backends run and why not
  memcore demo                                         about five minutes, one report page"""


def _bound(text: str) -> float | None:
    return None if text == "none" else float(text)


_bound.__name__ = "number or none"


def _seeds(text: str) -> list[int]:
    return [int(s) for s in text.split(",")]


_seeds.__name__ = "comma-separated seeds"


def _pair(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return key.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return key.replace("-", "_"), value


def _preset_table() -> str:
    from .train.presets import PRESETS

    lines = ["presets (updates x batch, optimizer, learning rate; NTM heads / controller; LSTM):"]
    for name, table in PRESETS.items():
        for task, entry in table.items():
            t, ntm, lstm = entry["train"], entry.get("ntm"), entry.get("lstm", {})
            arm = f"MANN {entry['mann']['controller_size']}" if ntm is None else f"NTM {ntm['read_heads']} / {ntm['controller_size']}"
            lines.append(
                f"  {name:8} {task:19} {t['steps']:>9,} x {t['batch_size']:<3} {t['optimizer']:7} {t['lr']:<6g}  {arm:13} "
                f"LSTM {lstm.get('num_layers')} x {lstm.get('hidden_size')}"
            )
    return "\n".join(lines)


def _common(p: argparse.ArgumentParser, *, run: bool = False) -> None:
    g = p.add_argument_group("running")
    g.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    g.add_argument("--data", metavar="DIR", help="folder of the data sets (default: $MEMCORE_DATA, then ~/.cache/memcore)")
    g.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    g.add_argument("--backend", choices=("auto", "reference", "native", "triton"), help="kernels (default: $MEMCORE_BACKEND, then auto)")
    if run:
        g.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1, ...")
        g.add_argument("--quiet", action="store_true", help="no progress bar")


def _parser() -> argparse.ArgumentParser:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="memcore", description="Memory-augmented neural networks: train, test, plot and measure them.", epilog=EXAMPLES, **raw
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    p = commands.add_parser(
        "train",
        help="train a Neural Turing Machine, a MANN or the LSTM baseline",
        description="Train one model, or several seeds and its LSTM baseline, on fresh sequences of a task; then test it.\n"
        "Options left out come from the preset (table below).",
        **raw,
    )
    p.add_argument("model", choices=("ntm", "mann", "lstm", "nec"), help="what to train; memcore train nec --help: its own flags")
    p.add_argument("--task", metavar="TASK", help=f"one of {', '.join(TASKS)} (default: omniglot for mann, else copy)")
    p.add_argument("--preset", default=None, help="default (CPU minutes) or paper (the published settings)")
    p.add_argument(
        "--set", action="append", default=[], type=_pair, metavar="NAME=VALUE", help="option of the task, e.g. ragged=true; repeatable"
    )
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, help="of weights and data (default: 0)")
    g.add_argument("--seeds", type=_seeds, metavar="0,1,2", help="several runs, one after the other, each in its own subfolder of --out")
    g.add_argument("--baseline", action="store_true", help="train the LSTM too, at equal updates on equal data")
    g.add_argument("--out", metavar="DIR", help="output folder (default: runs/TASK-MODEL-seedN)")
    g.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    g.add_argument("--until", type=float, metavar="LOSS", help="stop when training and validation loss are both this low")
    g.add_argument("--max-minutes", type=float, metavar="M", help="stop after so many minutes of training, resumed ones included")
    g.add_argument("--test-sequences", type=int, default=100, metavar="N", help="per test setting, at the end (default: 100)")
    g = p.add_argument_group("optimization")
    for flag, (dest, kwargs) in TRAIN_FLAGS.items():
        kwargs = {**kwargs, "type": _bound} if kwargs.get("type") == "bound" else kwargs
        g.add_argument(flag, dest=dest, default=argparse.SUPPRESS, **kwargs)
    g = p.add_argument_group("model")
    for flag, (dest, models, kwargs) in MODEL_FLAGS.items():
        help_text = f"{kwargs['help']} [{', '.join(models)}]"
        g.add_argument(flag, dest=f"model.{dest}", default=argparse.SUPPRESS, **{**kwargs, "help": help_text})
    _common(p, run=True)
    p.epilog = "PRESETS"

    p = commands.add_parser("eval", help="test a trained model at the task's test settings", **raw)
    p.add_argument("run", help="folder or checkpoint written by `memcore train`")
    p.add_argument("--sequences", type=int, default=100, metavar="N", help="per setting (default: 100)")
    p.add_argument("--seed", type=int, default=None, help="of the test sequences (default: the fixed one every run is tested on)")
    p.add_argument("--settings", metavar="A,B", help="only these of the task's test settings, e.g. 20,120")
    p.add_argument("--set", action="append", default=[], type=_pair, metavar="NAME=VALUE", help="a setting of your own, e.g. length=200")
    _common(p)

    p = commands.add_parser("plot", help="learning curves, memory traces, accuracy by instance", **raw)
    p.add_argument("kind", choices=("curve", "memory", "accuracy", "returns"), help="what to draw; returns: of agents")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders; for curve, runs that differ in the seed alone share a band")
    p.add_argument("--out", metavar="FILE", help="image to write, .png .svg .pdf (default: KIND.png in the first run's folder)")
    p.add_argument("--metric", metavar="NAME", help="curve: column to draw: loss, wrong_bits, accuracy.2 (the 2nd instance), ... (default: eval_loss)")
    p.add_argument("--log", action="store_true", help="curve: logarithmic axis")
    p.add_argument("--x", choices=("sequences", "step", "seconds"), default="sequences", help="curve: horizontal axis (default: sequences)")
    p.add_argument("--set", action="append", default=[], type=_pair, metavar="NAME=VALUE", help="memory: the sequence drawn, e.g. length=20")
    p.add_argument("--seed", type=int, default=0, help="memory: of the sequence drawn")
    p.add_argument("--sequences", type=int, default=1000, metavar="N", help="accuracy: test episodes (default: 1000)")
    p.add_argument("--level", type=float, metavar="X", help="returns: a return to mark; tells when each run reached it")
    _common(p)

    commands.add_parser("bench", help="measure kernels and models against eager PyTorch and torch.compile", add_help=False)
    commands.add_parser("data", help="find, download and check data sets", add_help=False)

    p = commands.add_parser("doctor", help="versions, backends and why one is missing, threads, data", **raw)
    _common(p)

    p = commands.add_parser("demo", help="train copy until solved, time the kernels, write a report page (about five minutes)", **raw)
    p.add_argument("--out", default="report", metavar="DIR", help="folder of the report (default: report)")
    p.add_argument("--minutes", type=float, default=3.0, metavar="M", help="at most so long for training copy (default: 3)")
    p.add_argument("--seed", type=int, default=0)
    _common(p)
    return parser


def _agent_parser() -> argparse.ArgumentParser:
    from .rl.cli import add_arguments

    parser = argparse.ArgumentParser(
        prog="memcore train nec",
        description="Train an agent with Neural Episodic Control, or several seeds and a DQN beside it.",
    )
    add_arguments(parser, _seeds)
    _common(parser)
    parser.set_defaults(command="train nec")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _emit(document: Any, text: str, as_json: bool) -> None:
    """The result on stdout: the document, with the text moved to stderr, or the text alone."""
    if as_json:
        _say(text)
        print(json.dumps(document, indent=1))
    else:
        print(text)


def _number(x: Any) -> str:
    if isinstance(x, list):
        return " ".join(_number(v) for v in x)
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def _test_table(test: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(k for row in test.values() for k in row))
    if {"bits", "nats"} & set(names):  # the loss under its unit's name
        names.remove("loss")
    return _rows_table([{"setting": s, **{n: row.get(n, "") for n in names}} for s, row in test.items()])


def _rows_table(table: list[dict[str, Any]]) -> str:
    rows = [list(table[0])] + [["-" if v is None else _number(v) for v in row.values()] for row in table]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def _summary(result: dict[str, Any]) -> str:
    optimum = "" if result["optimum"] is None else f", optimum {result['optimum']:.2f}"
    return (
        f"{result['task']}, {result['model']}, seed {result['seed']}, split {result['split']}: {result['updates']:,} updates, "
        f"{result['sequences']:,} sequences, {result['seconds']:,.0f} s, {result['threads']} thread(s), "
        f"{result['parameters']:,} parameters; stopped by {result['stopped']}{optimum}\n{_test_table(result['test'])}"
    )


def _configs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One configuration a run: seeds x arms."""
    from .train import configure

    task = args.task or ("omniglot" if args.model == "mann" else "copy")
    options = vars(args)
    arms = [args.model] + (["lstm"] if args.baseline and args.model != "lstm" else [])
    model_options: dict[str, dict[str, Any]] = {arm: {} for arm in arms}
    for flag, (dest, models, _) in MODEL_FLAGS.items():
        if f"model.{dest}" not in options:
            continue
        value = options[f"model.{dest}"]
        owners = [arm for arm in arms if arm in models]
        if not owners:
            raise ValueError(f"memcore train: '{flag}' is an option of {', '.join(models)}, got model {args.model!r}")
        if dest == "shift_range":
            if value < 1 or value % 2 == 0:
                raise ValueError(f"memcore train: '--shift-width' must be odd and >= 1, got {value}")
            value = value // 2
        for arm in owners:
            model_options[arm][dest] = value
    train = {dest: options[dest] for dest, _ in TRAIN_FLAGS.values() if dest in options}
    seeds = args.seeds if args.seeds is not None else [0 if args.seed is None else args.seed]
    return [
        configure(
            arm, task, name=args.preset or "default", task_options=dict(args.set), model_options=model_options[arm], seed=seed, **train
        )
        for seed in seeds
        for arm in arms
    ]


def _resumed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration of the run in `folder`; only the number of updates may change."""
    from .train.checkpoint import load_checkpoint
    from .train.loop import CHECKPOINT

    saved = load_checkpoint(folder / CHECKPOINT).meta.get("user") or {}
    for part in ("task", "task_options", "model", "model_options", "train", "preset"):
        a, b = saved.get(part), config[part]
        if part == "train":
            a, b = ({k: v for k, v in x.items() if k != "steps"} for x in (a or {}, b))
        if a != b:
            raise ValueError(f"memcore train: {part} must be {a} as in the run that is resumed in {str(folder)!r}, got {b}")
    return config


def _train(args: argparse.Namespace) -> int:
    from .train import run
    from .train.experiment import RESULT
    from .train.loop import CHECKPOINT

    if args.model == "nec":
        raise ValueError("memcore train: 'nec' must come first, as in: memcore train nec --env CartPole-v1")
    configs = _configs(args)
    many = len(configs) > 1
    results = []
    for config in configs:
        name = f"{config['model']}-seed{config['train']['seed']}"
        if many:
            folder = Path(args.out or f"runs/{config['task']}") / name
        else:
            folder = Path(args.out or f"runs/{config['task']}-{name}")
        resume = args.resume and ((folder / CHECKPOINT).exists() or not many)
        if resume:
            config = _resumed(config, folder)
            if many and (folder / RESULT).exists():
                results.append(json.loads((folder / RESULT).read_text()))
                if results[-1]["config"] == config:
                    _say(f"{folder}: finished before")
                    continue
                results.pop()
        result, _, _ = run(
            config,
            folder,
            resume=resume,
            until=args.until,
            max_minutes=args.max_minutes,
            test_sequences=args.test_sequences,
            data=args.data,
            device=args.device,
            progress=not args.quiet,
            log=_say,
        )
        results.append(result)
        if many:
            _say(_summary(result))
    _emit({"runs": results} if many else results[0], "\n".join(map(_summary, results)), args.json)
    return 0


def _train_agent(args: argparse.Namespace) -> int:
    from .rl.cli import train

    return train(args, _resumed, _say, _emit)


def _named(text: str, known: Iterable[str]) -> list[str]:
    """The names in a comma-separated list; a name may hold commas itself, as T=20,R=10 does: the longest that fits is taken."""
    known, names, rest = list(known), [], text
    while rest:
        fits = [name for name in known if rest == name or rest.startswith(f"{name},")]
        if not fits:
            break
        names.append(max(fits, key=len))
        rest = rest[len(names[-1]) + 1 :]
    if rest or not names:
        raise ValueError(f"memcore eval: '--settings' must name some of {'; '.join(known)}, got {rest!r}")
    return names


def _eval(args: argparse.Namespace) -> int:
    from .train import evaluate, load_run
    from .train.checkpoint import load_checkpoint
    from .train.experiment import split
    from .train.loop import CHECKPOINT, TEST_SEED, plain

    path = Path(args.run)
    loaded = load_checkpoint(path / CHECKPOINT if path.is_dir() or not path.exists() else path)
    if (loaded.meta.get("user") or {}).get("model") in ("nec", "dqn"):
        from .rl.cli import evaluate as evaluate_agent

        return evaluate_agent(args, _emit)
    model, task, config = load_run(args.run, data=args.data)
    settings = dict(task.test_settings)
    if args.settings is not None:
        settings = {name: settings[name] for name in _named(args.settings, settings)}
    if args.set:
        settings = {" ".join(f"{k}={v}" for k, v in args.set): dict(args.set)}
    seed = TEST_SEED if args.seed is None else args.seed
    test = evaluate(model, task, sequences=args.sequences, seed=seed, settings=settings)
    document = {
        "run": str(args.run),
        "task": config["task"],
        "model": config["model"],
        "trained_seed": config["train"]["seed"],
        "split": split(task),
        "test_sequences": args.sequences,
        "test_seed": seed,
        "test": plain(test),
    }
    _emit(document, f"{config['task']}, {config['model']}, {args.sequences} sequences a setting\n{_test_table(test)}", args.json)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from .train import plots

    first = Path(args.runs[0])
    out = Path(args.out) if args.out else (first if first.is_dir() else first.parent) / f"{args.kind}.png"
    if args.kind == "curve":
        plots.curve(args.runs, out, metric=args.metric or "eval_loss", x=args.x, log=args.log)
    elif args.kind == "returns":
        from .rl import plots as agents

        table = agents.compare(args.runs, level=args.level)
        agents.returns(args.runs, out, level=args.level)
        _emit({"plot": str(out), "runs": table}, f"{_rows_table(table)}\nwrote {out}", args.json)
        return 0
    elif args.kind == "memory":
        if len(args.runs) > 1:
            raise ValueError(f"memcore plot memory: 'RUN' must be one run, got {len(args.runs)}")
        plots.memory(args.runs[0], out, overrides=dict(args.set), seed=args.seed, data=args.data)
    else:
        plots.accuracy(args.runs, out, sequences=args.sequences, data=args.data)
    _emit({"plot": str(out)}, f"wrote {out}", args.json)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    report = doctor.examine(data=args.data)
    _emit(report, doctor.text(report), args.json)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    report = demo.run_demo(args.out, minutes=args.minutes, seed=args.seed, data=args.data, log=_say)
    _emit(report, f"wrote {Path(args.out) / 'index.html'}", args.json)
    return 0


def _run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"memcore: '--threads' must be >= 1, got {args.threads}")
        import torch

        torch.set_num_threads(args.threads)
    chosen: Any = nullcontext()
    if args.backend is not None:
        import memcore

        chosen = memcore.backend(args.backend)
    with chosen:
        return {"train": _train, "train nec": _train_agent, "eval": _eval, "plot": _plot, "doctor": _doctor, "demo": _demo}[args.command](args)


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if argv and argv[0] == "train" and {"-h", "--help"} & set(argv):
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        commands.choices["train"].epilog = _preset_table()
    try:
        if argv and argv[0] == "bench":
            from .bench.__main__ import main as bench

            return bench(argv[1:]) or 0
        if argv and argv[0] == "data":
            from .data import main as data

            return data(argv[1:]) or 0
        args = _agent_parser().parse_args(argv[2:]) if argv[:2] == ["train", "nec"] else parser.parse_args(argv)
        if getattr(args, "version", False):
            import memcore

            print(memcore.__version__)
            return 0
        if args.command is None:
            parser.print_help()
            return 2
        return _run(args)
    except KeyboardInterrupt as e:
        _say(f"memcore: {str(e) or 'interrupted'}" + ("; go on with --resume" if str(e) else ""))
        return 128 + getattr(e, "signum", 2)
    except BrokenPipeError:
        raise
    except Exception as e:
        if os.environ.get("MEMCORE_TRACEBACK") or not (
            isinstance(e, (ValueError, OSError, ImportError)) or str(e).startswith("memcore")
        ):
            raise
        _say(f"memcore: error: {' '.join(str(e).split())}")
        from .train import Diverged

        return 1 if isinstance(e, Diverged) else 2
