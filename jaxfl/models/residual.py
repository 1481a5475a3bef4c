"""Residual networks without batch statistics."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxfl.conv import matmul_conv


class ResNet(nn.Module):
    """Residual blocks of two 3x3 convolutions, so many a stage, see `resnet18`."""

    num_classes: int
    blocks: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    groups: int = 2
    convolution: Callable[..., jax.Array] = matmul_conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim != 4:
            raise ValueError(f"x must be images [B, H, W, C], got shape {x.shape}.")
        x = nn.relu(self.convolve_and_norm(x, self.width, 3))
        for stage, blocks in enumerate(self.blocks):
            features = self.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(self.convolve_and_norm(x, features, 3, stride))
                y = self.convolve_and_norm(y, features, 3)
                if stride != 1:
                    x = self.convolve_and_norm(x, features, 1, stride)
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))

    def convolve_and_norm(
        self, x: jax.Array, features: int, size: int, stride: int = 1
    ) -> Any:
        x = nn.Conv(
            features,
            (size, size),
            stride,
            padding=size // 2,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            conv_general_dilated=self.convolution,
        )(x)
        return nn.GroupNorm(self.groups)(x)


def resnet18(
    num_classes: int = 10,
    *,
    width: int = 64,
    groups: int = 2,
    convolution: Callable[..., jax.Array] = matmul_conv,
) -> ResNet:
    """ResNet-18 for 32x32 images, with group normalisation.

    Batch statistics of clients whose data differ do not average to those of the
    federation; group normalisation has none. The first convolution is 3x3 without
    a stride or pool, as usual for small images; a stage halves height and width and
    doubles the channels.

    Args:
      num_classes: number of outputs.
      width: channels of the first stage; a smaller network for smaller machines.
      groups: of channels that are normalised together; divides `width`.
      convolution: as in `cnn`.

    Returns:
      A linen module, `[B, H, W, C] -> logits [B, num_classes]`; 11,173,962 parameters
      on 32 x 32 x 3 inputs.

    Raises:
      ValueError: if `groups` does not divide `width`.

    Example:
      >>> from jaxfl import models
      >>> model = models.from_linen(resnet18(), jax.numpy.zeros((1, 32, 32, 3)))
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      11173962

    Reference:
      He, Zhang, Ren and Sun (2016), Deep Residual Learning for Image Recognition,
      arXiv:1512.03385. Groups in place of batches as in Hsieh, Phanishayee, Mutlu and
      Gibbons (2020), The Non-IID Data Quagmire of Decentralized Machine Learning,
      arXiv:1910.00189; two of them as in Reddi et al. (2021), Adaptive Federated
      Optimization, arXiv:2003.00295, section 4.
    """
    if groups < 1 or width < 1 or width % groups:
        raise ValueError(f"groups must divide width, got {groups=} and {width=}.")
    return ResNet(num_classes, width=width, groups=groups, convolution=convolution)
