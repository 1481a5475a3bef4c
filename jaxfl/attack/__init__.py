"""Attacks: on what is learned (senders that lie), and on whose data it is learned from.

Each is placed where its adversary stands. A liar is a channel at some clients
(`among`), or, where liars know each other's messages, an aggregator; poison is data; an
observer sees what a `tap` reports.
"""

from jaxfl.attack.gan import dcgan, gan

__all__ = ["dcgan", "gan"]
