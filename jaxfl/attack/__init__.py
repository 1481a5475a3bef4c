"""Attacks: on what is learned (senders that lie), and on whose data it is learned from.

Each is placed where its adversary stands. A liar is a channel at some clients
(`among`), or, where liars know each other's messages, an aggregator (`collude`); poison
is data; an observer sees what a `tap` reports.
"""

from jaxfl.attack.among import among
from jaxfl.attack.collude import Craft, alie, collude, ipm, mimic, min_max, min_sum
from jaxfl.attack.gan import dcgan, gan
from jaxfl.attack.inversion import (
    Inversion,
    best,
    cosine_distance,
    infer_label,
    invert,
    label_counts,
    match,
    psnr,
    replay,
    signed_adam,
    squared_error,
    ssim,
    total_variation,
)
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
from jaxfl.attack.poison import backdoor, label_flip, stamp, triggered
from jaxfl.attack.senders import nan, noise, scale, sign_flip

__all__ = [
    # who lies
    "among",
    "collude",
    # what a liar sends
    "sign_flip",
    "noise",
    "scale",
    "nan",
    # what liars craft together
    "Craft",
    "alie",
    "ipm",
    "min_max",
    "min_sum",
    "mimic",
    # what liars train on
    "label_flip",
    "backdoor",
    "stamp",
    "triggered",
    # a class that others hold
    "gan",
    "dcgan",
    # what a message tells of its data
    "Inversion",
    "invert",
    "replay",
    "best",
    "squared_error",
    "cosine_distance",
    "total_variation",
    "signed_adam",
    "infer_label",
    "label_counts",
    "psnr",
    "ssim",
    "match",
    # who was in the data
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
