"""The whole recurrence of a memory-augmented network with least-recently-used access."""

from .op import MANNParameters, MANNSequence, mann_sequence

__all__ = ["MANNParameters", "MANNSequence", "mann_sequence"]
