"""Networks that tell how long an engine has left, from a window of its sensors.

All take windows `[B, W, F]` and give the remaining life in units of the cap.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxfl
from jaxfl import models

CAP = 125.0
"""Cycles; an engine that has longer to live than that shows no wear yet."""
SENSORS = (
    *("T24", "T30", "T50", "P30", "Nf", "Nc", "Ps30", "phi", "NRf", "NRc"),
    *("BPR", "htBleed", "W31", "W32"),
)
"""The 14 that move, as Li, Ding and Sun 2018 chose them."""


class Convolution(nn.Module):
    """A 1-D convolution over time, of which the sensors are the channels.

    After Sateesh Babu, Zhao and Li 2016 and Li, Ding and Sun 2018, but one layer of
    wide filters in place of two or five of narrow ones, which was a cycle better: wear
    is a slow drift in noisy sensors. Its strides shorten the time, where theirs pools.
    """

    features: int = 64
    width: int = 16
    strides: int = 6
    hidden: int = 64
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x, train: bool = False):
        # Before the first flight, so that the last is in a filter's last place.
        missing = self.width - x.shape[1]
        early = max(missing, missing % self.strides)
        # As a matmul: XLA's convolution is slow in a loop on a CPU.
        x = nn.Conv(
            *(self.features, (self.width,), self.strides),
            padding=[(early, 0)],
            conv_general_dilated=jaxfl.matmul_conv,
        )(x)
        x = nn.relu(x).reshape(len(x), -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1)(x)


class Recurrent(nn.Module):
    """Long short-term memory and two dense layers: Zheng et al. 2017, one layer less.

    The layer that is left out is a second one of memory.
    """

    memory: int = 32
    hidden: tuple[int, ...] = (8, 8)

    @nn.compact
    def __call__(self, x):
        states: Any = nn.RNN(nn.OptimizedLSTMCell(self.memory))(x)
        return models.mlp(self.hidden, 1)(states[:, -1])


NETWORKS = {
    "linear": lambda: models.mlp((), 1),
    "mlp": lambda: models.mlp((64, 32), 1),
    "cnn": Convolution,
    "lstm": Recurrent,
}


def nasa_score(error: jax.Array) -> jax.Array:
    """NASA's penalty of each prediction, of which the score is the sum.

    `exp(-d / 13) - 1` where the failure is foretold too early, `d < 0`, and
    `exp(d / 10) - 1` where it is too late.

    >>> nasa_score(jnp.array([-13.0, 0.0, 10.0])).round(3).tolist()
    [1.718..., 0.0, 1.718...]

    Reference: Saxena et al. 2008, PHM08, equation 11.
    """
    return jnp.expm1(jnp.where(error < 0, -error / 13, error / 10))


def squared_error(outputs: jax.Array, life: jax.Array) -> jax.Array:
    """Of the life that is capped, in units of the cap."""
    return (outputs[:, 0] - jnp.minimum(life, CAP) / CAP) ** 2


def in_cycles(outputs: jax.Array, life: jax.Array) -> dict[str, jax.Array]:
    """Squared errors and NASA's penalty, against the life that is not capped.

    What is told is held between none and the cap, as all that is trained on is: a node
    that has seen one engine says what no engine does, and would be worse than a guess.
    """
    told = CAP * jnp.clip(outputs[:, 0], 0, 1)
    error, capped = told - life, told - jnp.minimum(life, CAP)
    return {"squared": error**2, "capped": capped**2, "score": nasa_score(error)}


def model_of(name: str, windows: jax.Array) -> models.Model:
    """The network of that name, on windows shaped as these."""
    return models.from_linen(
        NETWORKS[name](), windows, loss=squared_error, metrics=in_cycles
    )
