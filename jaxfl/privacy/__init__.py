"""Differential privacy: channels that bound and hide what one client contributes.

A channel bounds what one client sends (`clip`, `adaptive_clip`); another, anywhere to
its right, adds noise in proportion to that bound (`gaussian`, `laplace`). How far one
client can move what the noise is added to is worked out from the chain, so that neither
user nor accountant need know it:

    chain(clip(0.5), mean(denominator=100), gaussian(noise_multiplier=1.0))
"""

from jaxfl.privacy.clip import adaptive_clip, clip, clip_layers
from jaxfl.privacy.correlated import (
    correlated_gaussian,
    participation_sensitivity,
    tree_aggregation,
)
from jaxfl.privacy.mechanism import (
    Correlated,
    Gaussian,
    Laplace,
    Local,
    Reported,
    noise_left,
)
from jaxfl.privacy.noise import gaussian, laplace, local_gaussian, local_laplace

__all__ = [
    "clip",
    "clip_layers",
    "adaptive_clip",
    "gaussian",
    "laplace",
    "local_gaussian",
    "local_laplace",
    "correlated_gaussian",
    "tree_aggregation",
    "participation_sensitivity",
    "noise_left",
    "Correlated",
    "Gaussian",
    "Laplace",
    "Local",
    "Reported",
]
