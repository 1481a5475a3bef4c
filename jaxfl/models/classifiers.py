"""Classifiers of vectors and small images: dense layers, and a CNN."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxfl.conv import matmul_conv, max_pool
from jaxfl.dense import fused_dot

Initializers = Callable[[int], tuple[Any, Any]]


def lecun_normal(fan_in: int) -> tuple[Any, Any]:
    """Flax's default: weights normal with variance 1 / fan_in, biases zero.

    Args:
      fan_in: number of inputs of one output.

    Returns:
      The initializer of the weights and that of the biases.

    Example:
      >>> _, bias = lecun_normal(4)
      >>> bias(jax.random.key(0), (2,))
      Array([0., 0.], dtype=float32)
    """
    del fan_in  # Flax reads it off the kernel's shape
    return nn.initializers.lecun_normal(), nn.initializers.zeros


def torch_uniform(fan_in: int) -> tuple[Any, Any]:
    """PyTorch's default: weights and biases uniform in ±1 / sqrt(fan_in).

    Args:
      fan_in: number of inputs of one output.

    Returns:
      The initializer of the weights and that of the biases.

    Example:
      >>> weights, _ = torch_uniform(4)
      >>> float(jnp.abs(weights(jax.random.key(0), (4, 1000))).max()) <= 0.5
      True
    """
    bound = fan_in**-0.5

    def uniform(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform, uniform


class MLP(nn.Module):
    """Dense layers with ReLU between them, see `mlp`."""

    hidden: Sequence[int]
    num_classes: int
    initializers: Initializers = lecun_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = nn.relu(self.dense(size, x))
        return self.dense(self.num_classes, x)

    def dense(self, size: int, x: jax.Array) -> jax.Array:
        initial = _kernel_and_bias(self.initializers, x.shape[-1])
        return nn.Dense(size, dot_general=fused_dot, **initial)(x)


class CNN(nn.Module):
    """Two convolutions and two dense layers, see `cnn`."""

    num_classes: int
    initializers: Initializers = lecun_normal
    convolution: Callable[..., jax.Array] = matmul_conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim != 4:
            raise ValueError(f"x must be images [B, H, W, C], got shape {x.shape}.")
        for features in 32, 64:
            x = nn.Conv(
                features,
                kernel_size=(5, 5),
                conv_general_dilated=self.convolution,
                **_kernel_and_bias(self.initializers, 25 * x.shape[-1]),
            )(x)
            x = nn.relu(max_pool(x))  # the same as ReLU first, on a quarter of it
        return MLP((512,), self.num_classes, self.initializers)(x)


def _kernel_and_bias(init: Initializers, fan_in: int) -> dict[str, Any]:
    kernel, bias = init(fan_in)
    return {"kernel_init": kernel, "bias_init": bias}


def logistic_regression(
    num_classes: int = 10, *, init: Initializers = lecun_normal
) -> MLP:
    """Multinomial logistic regression: one dense layer on the flattened input.

    Args:
      num_classes: number of outputs.
      init: as in `mlp`.

    Returns:
      A linen module, `[B, ...] -> logits [B, num_classes]`.

    Example:
      >>> from jaxfl import models
      >>> model = models.from_linen(logistic_regression(), jnp.zeros((1, 28, 28, 1)))
      >>> import optax
      >>> optax.tree.size(model.init(jax.random.key(0)))
      7850
    """
    return mlp((), num_classes, init=init)


def mlp(
    hidden: Sequence[int] = (256, 128),
    num_classes: int = 10,
    *,
    init: Initializers = lecun_normal,
) -> MLP:
    """A multilayer perceptron on the flattened input, with ReLU.

    Args:
      hidden: sizes of the hidden layers.
      num_classes: number of outputs.
      init: `fan_in -> (initializer of the weights, of the biases)`, for instance
        `lecun_normal` or `torch_uniform`.

    Returns:
      A linen module, `[B, ...] -> logits [B, num_classes]`.

    Example:
      >>> from jaxfl import models
      >>> model = models.from_linen(mlp(init=torch_uniform), jnp.zeros((1, 28, 28, 1)))
      >>> import optax
      >>> optax.tree.size(model.init(jax.random.key(0)))
      235146
    """
    return MLP(tuple(hidden), num_classes, init)


def two_nn(num_classes: int = 10, *, init: Initializers = lecun_normal) -> MLP:
    """The 2NN: two hidden layers of 200 units each, with ReLU.

    Args:
      num_classes: number of outputs.
      init: as in `mlp`.

    Returns:
      A linen module, `[B, ...] -> logits [B, num_classes]`; 199,210 parameters on
      28 x 28 inputs.

    Example:
      >>> from jaxfl import models
      >>> model = models.from_linen(two_nn(), jnp.zeros((1, 28, 28, 1)))
      >>> import optax
      >>> optax.tree.size(model.init(jax.random.key(0)))
      199210

    Reference:
      McMahan, Moore, Ramage, Hampson and Arcas (2017), Communication-Efficient Learning
      of Deep Networks from Decentralized Data, arXiv:1602.05629, section 3.
    """
    return mlp((200, 200), num_classes, init=init)


def cnn(
    num_classes: int = 10,
    *,
    init: Initializers = lecun_normal,
    convolution: Callable[..., jax.Array] = matmul_conv,
) -> CNN:
    """The CNN: 5x5 convolutions of 32 and 64 channels, 2x2 pools, a layer of 512.

    Args:
      num_classes: number of outputs.
      init: as in `mlp`.
      convolution: the convolution itself, for instance `jax.lax.conv_general_dilated`.

    Returns:
      A linen module, `[B, H, W, C] -> logits [B, num_classes]`, H and W multiples of 4;
      1,663,370 parameters on 28 x 28 x 1 inputs.

    Example:
      >>> from jaxfl import models
      >>> model = models.from_linen(cnn(), jnp.zeros((1, 28, 28, 1)))
      >>> import optax
      >>> optax.tree.size(model.init(jax.random.key(0)))
      1663370

    Reference:
      McMahan, Moore, Ramage, Hampson and Arcas (2017), Communication-Efficient Learning
      of Deep Networks from Decentralized Data, arXiv:1602.05629, section 3.
    """
    return CNN(num_classes, init, convolution)
