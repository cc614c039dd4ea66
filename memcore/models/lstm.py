"""The LSTM baseline, with the interface of the memory networks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import _checks
from ._recurrent import check_input, check_lengths, check_state

__all__ = ["LSTMBaseline", "LSTMState"]


class LSTMState(NamedTuple):
    """h and c of `torch.nn.LSTM`, each [layers,B,K] ([layers,K] without a batch)."""

    h: Tensor
    c: Tensor

    def detach(self) -> "LSTMState":
        """The same state cut off from the graph, for truncated back-propagation through time."""
        return LSTMState(self.h.detach(), self.c.detach())


class LSTMBaseline(nn.Module):
    """`torch.nn.LSTM` with a linear layer on top: what a memory network is compared with.

    Args:
        input_size: X.
        output_size: O, the number of logits.
        hidden_size: K, units of each layer.
        num_layers: number of layers.
        batch_first: input and output are [B,T,...].
        device, dtype: of the parameters.

    Returns (on call):
        (output, state): logits and an `LSTMState`.

    Raises:
        ValueError, TypeError: for arguments that do not fit, when the model is made.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        hidden_size: int = 256,
        num_layers: int = 3,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"input_size": input_size, "output_size": output_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, value in sizes.items():
            _checks.whole("LSTMBaseline", name, value, 1)
        self.batch_first = batch_first
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=batch_first, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_size, output_size, device=device, dtype=dtype)
        with torch.no_grad():
            for name, bias in self.lstm.named_parameters():
                if name.startswith("bias"):
                    bias.zero_()
                if name.startswith("bias_ih"):
                    bias[hidden_size : 2 * hidden_size] = 1

    def initial_state(self, batch_size: int) -> LSTMState:
        """The state before the first step: zeros."""
        zeros = self.output.weight.new_zeros(self.lstm.num_layers, batch_size, self.lstm.hidden_size)
        return LSTMState(zeros, zeros)

    def forward(self, input: Tensor, state: LSTMState | None = None, lengths: Any = None) -> tuple[Tensor, LSTMState]:
        """Run over a sequence; arguments and results as in `memcore.NTM.forward`."""
        form = "B, T, X" if self.batch_first else "T, B, X"
        check_input("LSTMBaseline", input, self.output.weight, self.lstm.input_size, (form, "T, X"))
        batched = input.dim() == 3
        time = 1 if batched and self.batch_first else 0
        steps, batch_size = input.shape[time], input.shape[1 - time] if batched else 1
        if steps == 0:
            raise ValueError(f"memcore.LSTMBaseline: 'input' must have at least one time step, got shape {tuple(input.shape)}")
        state = self._enter(state, batch_size, batched)
        if lengths is None:
            hidden, after = self.lstm(input, state)
            return self.output(hidden), LSTMState(*after)

        found = check_lengths("LSTMBaseline", lengths, steps, batch_size, batched)
        lengths = torch.tensor(found)
        alive = torch.arange(steps).unsqueeze(1) < lengths
        alive = (alive.t() if self.batch_first else alive).unsqueeze(2).to(input.device)
        # Packing takes no empty items: they run one step on zeros, and what it did is undone.
        input = torch.where(alive, input, 0)
        packed = pack_padded_sequence(input, lengths.clamp(min=1), self.batch_first, enforce_sorted=False)
        hidden, after = self.lstm(packed, state)
        hidden, _ = pad_packed_sequence(hidden, self.batch_first, total_length=steps)
        if 0 in found:
            some = (lengths > 0).to(input.device).unsqueeze(1)
            after = (torch.where(some, new, old) for new, old in zip(after, state))
        return torch.where(alive, self.output(hidden), 0), LSTMState(*after)

    def step(self, input: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """One time step, for streaming: input [B,X] or [X] -> (logits [B,O] or [O], state)."""
        check_input("LSTMBaseline", input, self.output.weight, self.lstm.input_size, ("B, X", "X"))
        batched = input.dim() == 2
        state = self._enter(state, len(input) if batched else 1, batched)
        time = 1 if batched and self.batch_first else 0
        hidden, after = self.lstm(input.unsqueeze(time), state)
        return self.output(hidden.squeeze(time)), LSTMState(*after)

    def _enter(self, state: LSTMState | None, batch_size: int, batched: bool) -> LSTMState:
        if state is None:
            start = self.initial_state(batch_size)
            return start if batched else LSTMState(start.h[:, 0], start.c[:, 0])
        layers, size = self.lstm.num_layers, self.lstm.hidden_size
        sizes = (layers, batch_size, size) if batched else (layers, size)
        check_state("LSTMBaseline", state, LSTMState, {"h": sizes, "c": sizes}, batched=True)
        return state
