"""Secure aggregation: the server learns the sum of the messages and nothing else.

`fixed_point` makes whole numbers of a payload and `secure_sum` hides them behind masks
that cancel in the sum, both inside a compiled round:

    chain(clip(1.0), mean(denominator=100), fixed_point(1.0, 2**20), secure_sum())

`jaxfl.secure.protocol` is the protocol itself, with keys, ciphertexts and shares, for
small cohorts; it needs `pip install "jaxfl[crypto]"` and is imported by that name.
"""

from jaxfl.secure.cost import Traffic, traffic
from jaxfl.secure.fixed import Residues, fixed_point
from jaxfl.secure.graph import Graph, complete, sparse
from jaxfl.secure.masks import secure_sum

__all__ = [
    "fixed_point",
    "Residues",
    "secure_sum",
    "Graph",
    "complete",
    "sparse",
    "traffic",
    "Traffic",
]
