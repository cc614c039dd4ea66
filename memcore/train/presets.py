"""Settings of `memcore train`: one table by preset and task. Everything a run uses that is not on its command line is here.

`default` takes minutes on one core: of three seeds tried, all solve copy and two solve recall; in small sort all three stay below the
LSTM and none solves it; in n-grams all three come within 1.2 bits of the best estimator; all three learn repeat copy without an error in
its range; the entry of full sort is not tuned yet. `paper` is what the papers report (Graves et al. 2014,
section 4.6 tables 1-3; Santoro et al. 2016, section 4): batch 1, hours to days.

An entry holds `task` (options of the task), `train` (arguments of `train`, shared by every model so that arms get equal updates on equal
data), one entry a model with its options, and `<model>_train` where an arm needs its own optimizer settings.
"""

from copy import deepcopy
from typing import Any

__all__ = ["MODELS", "PRESETS", "preset"]

MODELS = ("ntm", "mann", "lstm")

_ADAM = {"batch_size": 16, "optimizer": "adam", "lr": 1e-3, "schedule": "cosine", "clip_norm": 10.0}
_GRAVES = {"batch_size": 1, "optimizer": "rmsprop", "lr": 1e-4, "schedule": "constant", "clip_value": 10.0}
# A norm bound of 1, not 10: one sequence that the model cannot do yet (an all-zero vector, in copy) then undoes less of what it has learned.
_NTM_ADAM = {**_ADAM, "batch_size": 8, "clip_norm": 1.0}
_UNSEEN = {"validation": {"part": "test"}, "eval_every": 200, "eval_sequences": 128}  # the curve shows characters that training never sees
_NTM = {"memory_slots": 128, "slot_width": 20, "controller": "lstm", "controller_size": 100}
# A feed-forward controller has nothing but the memory to remember with, and learns to use it in about 1,500 updates; an LSTM controller
# spends its first thousands on answering from its own state.
_FEEDFORWARD = {"controller": "feedforward"}
_LSTM = {"hidden_size": 128, "num_layers": 3}  # 331,905 parameters or more, against 13,536 (copy) to about 70,000 of the NTM


def _heads(n: int, **more: Any) -> dict[str, Any]:
    return {**_NTM, "read_heads": n, "write_heads": n, **more}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "copy": {"train": {**_NTM_ADAM, "steps": 8_000}, "ntm": _heads(1, **_FEEDFORWARD), "lstm": _LSTM},
        # The write head walks on while the copies are due, and no sequence in range ever punishes it: 20 vectors 10 times are 221 steps, so
        # on 128 slots it comes round and overwrites them. With a controller of 100 some seeds never learn to return to the first vector.
        # A controller without a state tells a zero vector from the zeros that stand while the copies are due by what it reads alone: hence
        # a second read head, and more such vectors than fair bits make.
        "repeat-copy": {
            "task": {"blank": 0.05},
            "train": {**_NTM_ADAM, "steps": 100_000, "eval_every": 500, "validation": {"ragged": True}, "keep": "best"},
            "ntm": _heads(1, read_heads=2, memory_slots=256, controller_size=256, **_FEEDFORWARD),
            "lstm": _LSTM,
        },
        # One or two read heads left most seeds at 3 to 17 bits; four solve two of three.
        "associative-recall": {
            "train": {**_NTM_ADAM, "steps": 4_000},
            "ntm": _heads(1, read_heads=4, controller_size=256, **_FEEDFORWARD),
            "lstm": _LSTM,
        },
        # What comes near the optimum is a log, each step in the next slot, read by content at all slots with the same last bits. That takes
        # shifts and slots (one run without shifts on 64 slots was at 164 bits after 3,200 updates) and read heads that start from content:
        # with gates at -2, two seeds of the same settings ended at 145 and 135 bits.
        "dynamic-ngrams": {
            "train": {**_ADAM, "steps": 6_000, "lr": 2e-3},
            "ntm": _heads(1, memory_init="learned", read_gate_bias=2.0),
            "lstm": {**_LSTM, "num_layers": 1},  # 67,201 parameters against 61,249
        },
        "priority-sort-small": {
            "train": {**_ADAM, "steps": 10_000},
            "ntm": _heads(4, controller_size=128, **_FEEDFORWARD),
            "lstm": _LSTM,
        },
        "priority-sort": {"train": {**_ADAM, "steps": 500_000}, "ntm": _heads(5, controller_layers=2), "lstm": _LSTM},
        # Strength and separate words are not the paper's: with strength 1 a read is close to the mean of all slots.
        "omniglot": {
            "task": {"shift": 2},  # pixels of 20 by which training drawings move
            "train": {**_ADAM, "steps": 40_000, **_UNSEEN, "eval_every": 500},
            "mann": {"memory_slots": 128, "slot_width": 40, "controller_size": 200, "read_heads": 4, "add": "separate", "strength": 10.0},
            "lstm": {"hidden_size": 200, "num_layers": 1},
        },
    },
    "paper": {
        "copy": {
            "train": {**_GRAVES, "steps": 1_000_000},
            "ntm": _heads(1),
            "lstm": {"hidden_size": 256, "num_layers": 3},
            "lstm_train": {"lr": 3e-5},
        },
        "repeat-copy": {
            "train": {**_GRAVES, "steps": 500_000},
            "ntm": _heads(1),
            "lstm": {"hidden_size": 512, "num_layers": 3},
            "lstm_train": {"lr": 3e-5},
        },
        "associative-recall": {
            "train": {**_GRAVES, "steps": 1_000_000},
            "ntm": _heads(1),
            "lstm": {"hidden_size": 256, "num_layers": 3},
        },
        "dynamic-ngrams": {
            "train": {**_GRAVES, "steps": 1_000_000, "lr": 3e-5},
            "ntm": _heads(1),
            "lstm": {"hidden_size": 128, "num_layers": 3},
            "lstm_train": {"lr": 1e-4},
        },
        "priority-sort": {
            "train": {**_GRAVES, "steps": 1_000_000, "lr": 3e-5},
            "ntm": _heads(5, controller_layers=2),
            "lstm": {"hidden_size": 128, "num_layers": 3},
        },
        "omniglot": {
            "train": {**_GRAVES, "steps": 100_000, "batch_size": 16, **_UNSEEN},
            "mann": {"memory_slots": 128, "slot_width": 40, "controller_size": 200, "read_heads": 4, "decay": 0.99},
            "lstm": {"hidden_size": 200, "num_layers": 1},
        },
    },
}


def preset(name: str, task: str, model: str) -> dict[str, dict[str, Any]]:
    """The settings {"task", "model", "train"} of one arm; a model without an entry for the task takes its class's defaults.

    Raises:
        ValueError: no such preset, task or model.
    """
    for what, value, known in (("preset", name, PRESETS), ("task", task, PRESETS.get(name, {})), ("model", model, MODELS)):
        if value not in known:
            raise ValueError(f"memcore.train: '{what}' must be one of {', '.join(known)}, got {value!r}")
    entry = deepcopy(PRESETS[name][task])
    return {
        "task": entry.get("task", {}),
        "model": entry.get(model, {}),
        "train": {**entry["train"], **entry.get(f"{model}_train", {})},
    }
