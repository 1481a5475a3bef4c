"""Differential privacy: channels that bound and hide what one client contributes.

A channel bounds what one client sends (`clip`, `adaptive_clip`); another, anywhere to
its right, adds noise in proportion to that bound (`gaussian`, `laplace`). How far one
client can move what the noise is added to is worked out from the chain, so that neither
user nor accountant need know it:

    chain(clip(0.5), mean(denominator=100), gaussian(noise_multiplier=1.0))

Clients hide a message from the server as well (`local_gaussian`, `local_laplace`,
`randomised_response`), or add shares of noise that protect a secure sum (`skellam`,
`discrete_gaussian`). `dp_sgd` protects the single examples of each client.

Recipes are expressions over these. With `sum_of = mean(denominator=d)`, and cohorts
that are drawn by `Poisson(d)` or take turns by `Cyclic(d)`:

    DP-FedAvg      federate(fedavg(loss, sgd), chain(clip(C), sum_of, gaussian(z)))
    DP-FedSGD      the same with fedavg(loss, sgd, batch_size=None)
    DP-FedAdam     the same with fedavg(loss, sgd, adam)
    adaptive       chain(adaptive_clip(0.5, C, clients=d), sum_of, gaussian(z))
    DP-FTRL        chain(clip(C), sum_of, correlated_gaussian(z, matrix, ...))
    local          chain(clip(C), local_gaussian(z), sum_of)
    distributed    chain(clip(C), compress.rotation(), sum_of,
                         skellam(z, ...), secure_sum())

`jaxfl.accounting.epsilon` takes any of them.
"""

from jaxfl.privacy.clip import (
    adaptive_clip,
    adaptive_zero_out,
    clip,
    clip_layers,
    zero_out,
)
from jaxfl.privacy.correlated import (
    correlated_gaussian,
    participation_sensitivity,
    tree_aggregation,
)
from jaxfl.privacy.distributed import discrete_gaussian, skellam
from jaxfl.privacy.dp_sgd import dp_sgd, example_epsilon
from jaxfl.privacy.mechanism import (
    Correlated,
    DiscreteGaussian,
    Distributed,
    Gaussian,
    Laplace,
    Local,
    RandomisedResponse,
    Reported,
    Skellam,
    discrete_gaussian_rdp,
    noise_left,
    skellam_rdp,
)
from jaxfl.privacy.noise import gaussian, laplace, local_gaussian, local_laplace
from jaxfl.privacy.response import randomised_response

__all__ = [
    "clip",
    "clip_layers",
    "adaptive_clip",
    "zero_out",
    "adaptive_zero_out",
    "gaussian",
    "laplace",
    "local_gaussian",
    "local_laplace",
    "randomised_response",
    "skellam",
    "discrete_gaussian",
    "dp_sgd",
    "example_epsilon",
    "skellam_rdp",
    "discrete_gaussian_rdp",
    "correlated_gaussian",
    "tree_aggregation",
    "participation_sensitivity",
    "noise_left",
    "Correlated",
    "Gaussian",
    "Laplace",
    "Local",
    "Reported",
    "RandomisedResponse",
    "Distributed",
    "Skellam",
    "DiscreteGaussian",
]
