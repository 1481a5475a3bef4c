"""Attacks: on what is learned (senders that lie), and on whose data it is learned from.

Each is placed where its adversary stands. A liar is a channel at some clients
(`among`), or, where liars know each other's messages, an aggregator; poison is data; an
observer sees what a `tap` reports.
"""

from jaxfl.attack.membership import (
    alignment,
    auc,
    confidence,
    lira,
    lira_each,
    loss_threshold,
    private_tpr,
    random_halves,
    shadow_scores,
    tpr_at_fpr,
)

__all__ = [
    # membership
    "alignment",
    "auc",
    "confidence",
    "lira",
    "lira_each",
    "loss_threshold",
    "private_tpr",
    "random_halves",
    "shadow_scores",
    "tpr_at_fpr",
]
