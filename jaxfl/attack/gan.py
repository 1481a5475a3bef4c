"""A client that reconstructs what others hold: the model is its discriminator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxfl.conv import matmul_conv
from jaxfl.core import Algorithm, Params, PyTree, keep

Generate = Callable[[Params, jax.Array], jax.Array]
ExampleLoss = Callable[[Params, PyTree, jax.Array], jax.Array]


class GanState(NamedTuple):
    """A client's state; only the adversary's generator ever changes.

    Attributes:
      algorithm: that of the algorithm.
      generator: the parameters of the generator.
      optimizer: the state of the generator's optimiser.
    """

    algorithm: PyTree
    generator: Params
    optimizer: optax.OptState


def gan(
    algorithm: Algorithm,
    lying: Callable[[ExampleLoss], Algorithm],
    loss: ExampleLoss,
    generate: Generate,
    generator: Params,
    optimizer: optax.GradientTransformation,
    *,
    adversary: int | jax.Array,
    target: int | jax.Array,
    fake: int | jax.Array,
    steps: int = 1,
    weight: float | jax.Array = 1.0,
) -> Algorithm:
    """An algorithm among whose clients one reconstructs a class that others hold.

    In each round the adversary takes the broadcast `w` for the discriminator, trains
    its generator G by steps on

        E_z f(w; G(z), target)

    and then the model itself, as everyone does, on its own examples and on samples that
    it says are of another class,

        sum_b f(w; x_b, y_b) / B + weight E_z f(w; G(z), fake)

    so that those who hold the target have to tell it apart from the samples better.
    What it sends is an update like any other, and passes whatever channel there is. The
    others, and a round without the adversary, are those of `algorithm`, to the bit.

    Every client has a state for a generator, as one program is all clients': that is N
    times its size. Unless clients are done one after another (`chunk_size=1`) they all
    do the adversary's work too, to throw it away.

    Args:
      algorithm: what the others do; its broadcast is the model, its metrics a dict.
      lying: `loss -> algorithm`, what the adversary does with a loss of its own: an
        algorithm with the same states, payload and metrics.
      loss: `(params, batch, key) -> [B]` of a batch `{"x", "y"}`, one loss for each
        example; f above.
      generate: `(generator, key) -> [B, ...]`, samples as `x` of a batch is.
      generator: the generator's parameters to begin with.
      optimizer: of the generator; its state stays from round to round.
      adversary: population id of the client; it needs an example of its own.
      target: the class to reconstruct.
      fake: the class that samples are said to be of: one more than there are, or any
        that the adversary holds.
      steps: of the generator in a round.
      weight: of the samples against the adversary's own examples; 0 only listens.

    Returns:
      An algorithm whose clients' states are `GanState`; its metrics have "generator"
      too, the mean over the steps of the generator's loss, NaN at other clients.

    Raises:
      TypeError: if algorithm, or what lying makes, is no algorithm.
      ValueError: if steps is not positive, weight is negative, or target and fake are
        the same class.

    >>> from jaxfl import fedavg, federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):  # classes 0, 1 and 2, each round a number
    ...     distance = (batch["x"][:, None] - w) ** 2
    ...     return optax.softmax_cross_entropy_with_integer_labels(
    ...         -distance, batch["y"])
    >>> def train(loss):
    ...     return fedavg(loss, optax.sgd(0.1), batch_size=None, epochs=5)
    >>> data = from_arrays(
    ...     jnp.array([3.0, -3.0]), jnp.array([0, 1]), client_ids=[0, 1])
    >>> attacked = gan(
    ...     train(loss), train, loss, lambda g, key: g[None], jnp.float32(0.0),
    ...     optax.sgd(0.1), adversary=1, target=0, fake=2)
    >>> state, _ = simulate(
    ...     federate(attacked, mean()), jnp.array([0.5, -0.5, 0.0]), data,
    ...     rounds=100, key=jax.random.key(0), progress=False)
    >>> bool(state.clients.algorithm.generator[1] > 2)  # near 3, which it never saw
    True

    Reference: Hitaj, Ateniese, Perez-Cruz 2017, arXiv:1702.07464, algorithm 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    if isinstance(weight, int | float) and not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}.")
    if isinstance(target, int) and isinstance(fake, int) and target == fake:
        raise ValueError(f"fake must be another class than target, got {fake} twice.")
    for name, part in (("algorithm", algorithm), ("lying(loss)", lying(loss))):
        if not isinstance(part, Algorithm):
            raise TypeError(f"{name} must be a jaxfl.Algorithm, got {part!r}.")

    def called(params, generator, label, key):
        """The mean loss of the model on samples, if they were of a class."""
        sample_key, loss_key = jax.random.split(key)
        x = generate(generator, sample_key)
        batch = {"x": x, "y": jnp.full(x.shape[:1], label, jnp.int32)}
        return jnp.mean(loss(params, batch, loss_key))

    def deceive(key, params, generator, state):
        def step(i, carry):
            generator, state, total = carry
            value, grads = jax.value_and_grad(called, 1)(
                params, generator, target, jax.random.fold_in(key, i)
            )
            updates, state = optimizer.update(grads, state, generator)
            generator = optax.apply_updates(generator, updates)
            return generator, state, total + value.astype(jnp.float32)

        carry = generator, state, jnp.float32(0)
        generator, state, total = jax.lax.fori_loop(0, steps, step, carry)
        return generator, state, total / steps

    def init(params):
        server, own = algorithm.init(params)
        return server, GanState(own, generator, optimizer.init(generator))

    def client(ctx, broadcast, state, data):
        def honest(state):
            payload, own, metrics = algorithm.client(
                ctx, broadcast, state.algorithm, data
            )
            nothing = {"generator": jnp.float32(jnp.nan)}
            return payload, state._replace(algorithm=own), metrics | nothing

        def lie(state):
            # The key itself is the algorithm's, as at every client.
            key = jax.random.fold_in(ctx.key, 1)
            generator, optimizer, value = deceive(
                key, broadcast, state.generator, state.optimizer
            )

            def with_samples(params, batch, key):
                sample_key = jax.random.fold_in(key, 1)
                samples = called(params, generator, fake, sample_key)
                return loss(params, batch, key) + weight * samples

            payload, own, metrics = lying(with_samples).client(
                ctx, broadcast, state.algorithm, data
            )
            state = GanState(own, generator, optimizer)
            return payload, state, metrics | {"generator": value}

        return jax.lax.cond(ctx.client == adversary, lie, honest, state)

    def receive(broadcast, payload, state, delivered):
        own = algorithm.receive(broadcast, payload, state.algorithm, delivered)
        return state._replace(algorithm=own)

    def bits_down(ctx, server_state, state):
        return algorithm.bits_down(ctx, server_state, state.algorithm)

    return algorithm._replace(
        init=init,
        client=client,
        receive=keep if algorithm.receive is keep else receive,
        bits_down=bits_down,
    )


class DCGAN(nn.Module):
    """Dense, then twice as large and convolved, twice; see `dcgan`."""

    features: int

    @nn.compact
    def __call__(self, z: jax.Array) -> Any:
        def conv(features, x):
            layer = nn.Conv(features, (3, 3), conv_general_dilated=matmul_conv)
            return layer(twice(x))

        x = nn.Dense(7 * 7 * 2 * self.features)(z)
        x = nn.relu(standardized(x.reshape(-1, 7, 7, 2 * self.features)))
        x = nn.relu(standardized(conv(self.features, x)))
        return 0.5 + 0.5 * jnp.tanh(conv(1, x))


def dcgan(features: int = 32) -> DCGAN:
    """A small generator of images of 28 x 28, in the manner of DCGAN.

    A dense layer to 7 x 7, and two convolutions, each after the image is made twice as
    large; channels standardised over the batch, ReLU, and a tanh at the end.

    Args:
      features: channels of the larger hidden image; the smaller has twice as many.

    Returns:
      A linen module, `z [B, Z] -> [B, 28, 28, 1]`, from 0 to 1, with B of 2 or more.

    >>> images, _ = dcgan(8).init_with_output(jax.random.key(0), jnp.ones((2, 16)))
    >>> images.shape
    (2, 28, 28, 1)

    Reference: Radford, Metz, Chintala 2016, arXiv:1511.06434, with resized images in
    place of transposed convolutions (Odena, Dumoulin, Olah 2016).
    """
    return DCGAN(features)


def twice(x: jax.Array) -> jax.Array:
    """Each pixel four times: `[B, H, W, C]` to `[B, 2H, 2W, C]`."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def standardized(x: jax.Array) -> jax.Array:
    """Each channel with mean 0 and variance 1 over a batch of images."""
    return jax.nn.standardize(x, axis=(0, 1, 2), epsilon=1e-5)
