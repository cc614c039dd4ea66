"""Memory networks with the conventions of `torch.nn.LSTM`; one system a file."""

from .lstm import LSTMBaseline, LSTMState
from .mann import MANN, MANNCell, MANNState
from .nec import NEC, NECOutput, QNetwork
from .ntm import NTM, NTMCell, NTMState

__all__ = ["LSTMBaseline", "LSTMState", "MANN", "MANNCell", "MANNState", "NEC", "NECOutput", "NTM", "NTMCell", "NTMState", "QNetwork"]
