"""The sum, which is all that plain averaging needs."""

from jaxfl.core import Aggregator


def total() -> Aggregator:
    """The sum of all messages, delivered to everyone who sent.

    `sum_{i in S} payload_i`. Linear: streamed over chunks and devices. With `mean()`
    as a channel round it, it is the weighted mean of McMahan et al. 2017.

    >>> total().linear
    True
    """

    def apply(ctx, payload, sent, state):
        return payload, sent, state

    return Aggregator(init=lambda payload: (), apply=apply, linear=True)
