"""How short a payload could be."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxfl.core import Channel


def entropy(name: str = "entropy_bits") -> Channel:
    """Changes nothing and reports how long an entropy code of the payload would be.

    Of d numbers of which n are different, v_1, ..., v_n with counts c_1, ..., c_n: a
    table of them, and an arithmetic code of which is where,

        d H + n (b + ceil(log2(d + 1))) + 32,    H = sum_j (c_j / d) log2(d / c_j)

    with b the bits of a number in the payload's dtype and 32 for n. Put it right of a
    codec, whose fixed-length `bits` stay as they are, and left of `mean()`, which
    scales. It sorts the payload, which on a CPU takes far longer than any codec.

    Client sends: its message as it came. Server sees: the report. Bits: as before.

    Args:
      name: the key of the report, float32 `[]`; 0 for a message that is withheld.

    >>> from jaxfl.core import Message
    >>> x = jnp.array([0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.5, 0.5])
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(256.0))
    >>> _, _, report = entropy().encode(None, update, (), ())
    >>> report["entropy_bits"].item()  # 8 bits, and 2 numbers with counts up to 8
    112.0

    Reference: Witten, Neal and Cleary 1987, Arithmetic coding for data compression.
    """

    def encode(ctx, message, server_state, client_state):
        x, _ = ravel_pytree(message.payload)
        d, x = x.size, jnp.sort(x)
        place = jnp.arange(d)
        first = jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])
        start = jnp.where(first, place, d)  # and where the next run starts:
        end = jnp.append(jax.lax.cummin(start, reverse=True)[1:], d)
        count = jnp.where(first, end - place, 1).astype(jnp.float32)
        code = jnp.sum(jnp.where(first, count * jnp.log2(d / count), 0.0))
        entry = jnp.finfo(x.dtype).bits + d.bit_length()
        bits = code + jnp.sum(first) * entry + 32.0
        return message, client_state, {name: jnp.where(message.weight > 0, bits, 0.0)}

    return Channel(encode=encode)
