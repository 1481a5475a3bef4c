"""Codecs: what of a payload is sent, and in how few bits.

A codec is a channel whose `encode` makes of a payload what the server will decode its
bits to, so that messages of different scales can be summed, and sets the length of
those bits. In a chain it is the last codec's bits that travel. Each has a reference
encoder in `tests/encoders.py`, whose length in bytes is what the ledger says.
"""

from jaxfl.compress.coding import entropy
from jaxfl.compress.feedback import differences, error_feedback
from jaxfl.compress.leaves import leafwise
from jaxfl.compress.quantise import cast, qsgd, terngrad, uniform
from jaxfl.compress.rotations import drive, eden, rotation
from jaxfl.compress.sign import scaled_sign, sign_majority
from jaxfl.compress.sketch import fetchsgd
from jaxfl.compress.sparse import random_k, top_k
from jaxfl.compress.vector import codec

__all__ = [
    "top_k",
    "random_k",
    "cast",
    "uniform",
    "qsgd",
    "terngrad",
    "scaled_sign",
    "sign_majority",
    "rotation",
    "eden",
    "drive",
    "fetchsgd",
    "error_feedback",
    "differences",
    "leafwise",
    "codec",
    "entropy",
]
