"""`memcore train nec`: its flags, its configurations, what it prints."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "train"]

BOTH = ("nec", "dqn")
# flag -> (setting, agents that have it, add_argument settings)
TRAIN_FLAGS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "--steps": ("steps", BOTH, {"type": int, "metavar": "N", "help": "steps of the environment in all"}),
    "--period": ("period", BOTH, {"type": int, "metavar": "N", "help": "steps between updates (paper: 4)"}),
    "--learning-starts": ("learning_starts", BOTH, {"type": int, "metavar": "N", "help": "steps before the first update"}),
    "--batch-size": ("batch_size", BOTH, {"type": int, "metavar": "B", "help": "records an update (paper: 32)"}),
    "--lr": ("lr", BOTH, {"type": float, "metavar": "X", "help": "learning rate of the network, Adam"}),
    "--memory-lr": ("memory_lr", ("nec",), {"type": float, "metavar": "X", "help": "learning rate of keys and values, row-sparse Adam"}),
    "--grad-keys": ("grad_keys", ("nec",), {"choices": ("on", "off"), "help": "keys learn by backpropagation (paper: on)"}),
    "--n-step": ("n_step", ("nec",), {"type": int, "metavar": "N", "help": "rewards in a target (paper: 100)"}),
    "--gamma": ("gamma", BOTH, {"type": float, "metavar": "G", "help": "discount (paper: 0.99)"}),
    "--replay": ("replay", BOTH, {"type": int, "metavar": "N", "help": "records kept (paper: 1e5)"}),
    "--clip-norm": ("clip_norm", BOTH, {"type": "bound", "metavar": "X", "help": "bound of the gradient's norm, or none"}),
    "--target-every": ("target_every", ("dqn",), {"type": int, "metavar": "N", "help": "updates between copies of the target network"}),
    "--epsilon-start": ("epsilon_start", BOTH, {"type": float, "metavar": "X", "help": "rate of random actions at the first step"}),
    "--epsilon-end": ("epsilon_end", BOTH, {"type": float, "metavar": "X", "help": "rate of random actions in the end"}),
    "--epsilon-steps": ("epsilon_steps", BOTH, {"type": int, "metavar": "N", "help": "steps from the one to the other"}),
    "--log-every": ("log_every", BOTH, {"type": int, "metavar": "N", "help": "steps between rows of the learning curve"}),
    "--eval-episodes": ("eval_episodes", BOTH, {"type": int, "metavar": "N", "help": "greedy episodes at each row"}),
}
MODEL_FLAGS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "--encoder": ("encoder", BOTH, {"choices": ("mlp", "minatar", "nature"), "help": "network in front of the keys"}),
    "--hidden": ("hidden", BOTH, {"type": int, "metavar": "K", "help": "units of its hidden layer"}),
    "--key-width": ("key_width", BOTH, {"type": int, "metavar": "D", "help": "width of a key"}),
    "--capacity": ("capacity", ("nec",), {"type": int, "metavar": "N", "help": "entries of each action's dictionary (paper: 5e5)"}),
    "--neighbours": ("neighbours", ("nec",), {"type": int, "metavar": "K", "help": "entries that make a value (paper: 50)"}),
    "--delta": ("delta", ("nec",), {"type": float, "metavar": "X", "help": "added to squared distances (paper: 1e-3)"}),
    "--alpha": ("alpha", ("nec",), {"type": float, "metavar": "X", "help": "step of the value of an observation met again"}),
}


def _bound(text: str) -> float | None:
    return None if text == "none" else float(text)


_bound.__name__ = "number or none"


def add_arguments(p: argparse.ArgumentParser, seeds: Callable[[str], list[int]]) -> None:
    """The flags of `memcore train nec`."""
    p.add_argument("--env", default="CartPole-v1", metavar="NAME", help="Catch, a name of gymnasium's (CartPole-v1), MinAtar/GAME-v1, ALE/GAME-v5")
    p.add_argument("--agent", choices=BOTH, default="nec", help="nec, or dqn: the baseline of the same network (default: nec)")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, help="of weights, episodes and exploration (default: 0)")
    g.add_argument("--seeds", type=seeds, metavar="0,1,2", help="several runs, one after the other, each in its own subfolder of --out")
    g.add_argument("--baseline", action="store_true", help="train the DQN too, for equally many steps")
    g.add_argument("--out", metavar="DIR", help="output folder (default: runs/ENV-AGENT-seedN)")
    g.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    g.add_argument("--max-minutes", type=float, metavar="M", help="stop after so many minutes of training, resumed ones included")
    g.add_argument("--test-episodes", type=int, default=20, metavar="N", help="greedy episodes at the end (default: 20)")
    g.add_argument("--quiet", action="store_true", help="no progress bar")
    for title, flags, prefix in (("learning", TRAIN_FLAGS, "train"), ("model", MODEL_FLAGS, "model")):
        g = p.add_argument_group(title, "left out: as the environment's preset has it")
        for flag, (dest, agents, kwargs) in flags.items():
            kwargs = {**kwargs, "type": _bound} if kwargs.get("type") == "bound" else kwargs
            note = "" if agents == BOTH else f" [{', '.join(agents)}]"
            g.add_argument(flag, dest=f"{prefix}.{dest}", default=argparse.SUPPRESS, **{**kwargs, "help": kwargs["help"] + note})


def _configs(args: argparse.Namespace) -> list[dict[str, Any]]:
    from .experiment import configure_agent

    agents = [args.agent] + (["dqn"] if args.baseline and args.agent != "dqn" else [])
    given: dict[str, dict[str, dict[str, Any]]] = {a: {"train": {}, "model": {}} for a in agents}
    for prefix, flags in (("train", TRAIN_FLAGS), ("model", MODEL_FLAGS)):
        for flag, (dest, owners, kwargs) in flags.items():
            if f"{prefix}.{dest}" not in vars(args):
                continue
            value = vars(args)[f"{prefix}.{dest}"]
            if not set(owners) & set(agents):
                raise ValueError(f"memcore train nec: '{flag}' is an option of agent {', '.join(owners)}, got agent {args.agent!r}")
            for agent in set(owners) & set(agents):
                given[agent][prefix][dest] = value == "on" if kwargs.get("choices") == ("on", "off") else value
    seeds = args.seeds if args.seeds is not None else [0 if args.seed is None else args.seed]
    return [
        configure_agent(agent, args.env, model_options=given[agent]["model"], seed=seed, **given[agent]["train"])
        for seed in seeds
        for agent in agents
    ]


def summary(result: dict[str, Any]) -> str:
    """A few lines on a run."""
    middle, last, test = result["return_51_100"], result["return_last_100"], result["test"]
    lines = [
        f"{result['task']}, {result['model']}, seed {result['seed']}: {result['steps']:,} steps, {result['episodes']:,} episodes, "
        f"{result['seconds']:,.0f} s, {result['threads']} thread(s), {result['parameters']:,} parameters; stopped by {result['stopped']}"
    ]
    if middle is not None:
        lines.append(f"  episodes 51-100: mean return {middle['mean']:.2f} (steps {middle['after_step']:,} to {middle['to_step']:,})")
    if last is not None:
        lines.append(f"  last 100 episodes: mean return {last:.2f}")
    return "\n".join([*lines, f"  {test['episodes']} greedy episodes: mean return {test['mean']:.2f}, from {test['min']:g} to {test['max']:g}"])


def train(args: argparse.Namespace, resumed: Callable, say: Callable[[str], None], emit: Callable) -> int:
    """Run what the arguments ask for; `resumed` checks a configuration against a run's, `say` and `emit` print."""
    from ..train.experiment import RESULT
    from ..train.loop import CHECKPOINT
    from .experiment import run_agent

    configs = _configs(args)
    many, results = len(configs) > 1, []
    where = args.env.replace("/", "-")
    for config in configs:
        name = f"{config['model']}-seed{config['train']['seed']}"
        folder = Path(args.out or f"runs/{where}") / name if many else Path(args.out or f"runs/{where}-{name}")
        resume = args.resume and ((folder / CHECKPOINT).exists() or not many)
        if resume:
            config = resumed(config, folder)
            if many and (folder / RESULT).exists():
                result = json.loads((folder / RESULT).read_text())
                if result["config"] == config:
                    say(f"{folder}: finished before")
                    results.append(result)
                    continue
        result, _ = run_agent(
            config, folder, resume=resume, max_minutes=args.max_minutes, test_episodes=args.test_episodes, progress=not args.quiet, log=say
        )
        results.append(result)
        if many:
            say(summary(result))
    emit({"runs": results} if many else results[0], "\n".join(map(summary, results)), args.json)
    return 0


def evaluate(args: argparse.Namespace, emit: Callable) -> int:
    """`memcore eval` of an agent: greedy episodes."""
    from .experiment import load_agent
    from .loop import EVAL_SEED, play

    for flag, given in (("--settings", args.settings), ("--set", args.set)):
        if given:
            raise ValueError(f"memcore eval: '{flag}' is an option of tasks, got a run of an agent")
    if args.sequences < 1:
        raise ValueError(f"memcore eval: '--sequences' must be >= 1, got {args.sequences}")
    agent, env, config = load_agent(args.run)
    seed = EVAL_SEED if args.seed is None else args.seed
    returns = play(env, agent, episodes=args.sequences, seed=seed)
    mean = sum(returns) / len(returns)
    document = {
        "run": str(args.run), "task": config["task"], "model": config["model"], "trained_seed": config["train"]["seed"],
        "test_episodes": args.sequences, "test_seed": seed, "test": {"mean": mean, "min": min(returns), "max": max(returns)},
    }  # fmt: skip
    text = f"{config['task']}, {config['model']}: {args.sequences} greedy episodes, mean return {mean:.2f}"
    emit(document, f"{text}, from {min(returns):g} to {max(returns):g}", args.json)
    return 0
