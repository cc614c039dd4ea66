"""Content addressing: softmax over the slots of key strength times similarity."""

from .op import content_addressing

__all__ = ["content_addressing"]
