"""What one message tells of the data it was computed from: gradient inversion.

An observer who knows the model looks for data whose message would be the one that it
saw. What it saw is what a `tap` reports that is placed where it stands.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl.channel import identity
from jaxfl.core import Algorithm, Channel, Message, Params, Payload, server_context
from jaxfl.data.federated import group

PyTree = Any


class Inversion(NamedTuple):
    """What was found in place of a client's data.

    Attributes:
      candidate: the best point met, shaped as the start.
      loss: float32 `[]`, how far its message is from the observed one, and how
        unlikely it is by the prior, if any.
    """

    candidate: PyTree
    loss: jax.Array


def squared_error(a: Payload, b: Payload) -> jax.Array:
    """`||a - b||_2^2`, over all leaves together: the distance of DLG.

    >>> squared_error({"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)}).item()
    5.0
    """
    return optax.tree.norm(optax.tree.sub(a, b), squared=True)


def cosine_distance(a: Payload, b: Payload) -> jax.Array:
    """`1 - <a, b> / (||a|| ||b||)`, over all leaves together; 1 where one is zero.

    No clipping and no learning rate changes it, as neither changes a direction.

    >>> cosine_distance(jnp.array([3.0, 0.0]), jnp.array([4.0, 3.0])).round(3).item()
    0.2
    """
    norms = _norm(a) * _norm(b)
    return 1 - optax.tree.vdot(a, b) / norms


def _norm(x: Payload) -> jax.Array:
    """The Euclidean norm, but 1 of zeros, where it has no derivative."""
    square = optax.tree.norm(x, squared=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))


def total_variation(x: jax.Array) -> jax.Array:
    """`mean |x_{i+1,j} - x_{i,j}| + mean |x_{i,j+1} - x_{i,j}|`, small if smooth.

    Args:
      x: images, `[..., H, W, C]`.

    >>> total_variation(jnp.array([0.0, 1.0, 0.0]).reshape(3, 1, 1)).item()
    1.0

    Reference: Rudin, Osher, Fatemi 1992, in the anisotropic form of Geiping et al.
    2020, arXiv:2003.14053.
    """
    down, right = jnp.diff(x, axis=-3), jnp.diff(x, axis=-2)
    return sum(jnp.sum(jnp.abs(d)) / max(d.size, 1) for d in (down, right))


def replay(
    algorithm: Algorithm, params: Params, channel: Channel | None = None
) -> Callable[[PyTree], Payload]:
    """What a client would send, as a function of its examples.

    It runs the very `client` of the algorithm, local steps and all, and can be
    differentiated. What the observer does not know it cannot replay: the key is one of
    its own, so that noise, or the order of batches, is another than the client's. An
    order plays no part with `batch_size=None` or `shuffle=False`.

    Args:
      algorithm: of the federation that is observed.
      params: the model that the client got.
      channel: what stands between the client and the observer; nothing by default.
        Without its random parts.

    Returns:
      `examples -> payload`, where the examples are a pytree of `[B, ...]` arrays.

    >>> from jaxfl import clip, fedavg
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["x"]) ** 2
    >>> sgd = fedavg(loss, optax.sgd(0.5), batch_size=None, epochs=2)
    >>> examples = {"x": jnp.array([1.0, 3.0])}
    >>> replay(sgd, jnp.float32(0))(examples).item()  # -1 and then -0.5
    -1.5
    >>> replay(sgd, jnp.float32(0), clip(0.5))(examples).round(3).item()
    -0.5
    """
    channel = identity() if channel is None else channel
    server_state, client_state = algorithm.init(params)
    broadcast = algorithm.broadcast(server_state)
    roster, zero = jnp.zeros(1, jnp.int32), jnp.int32(0)
    ctx = server_context(
        jax.random.key(0), zero, roster, roster == 0, jnp.int32(1), broadcast
    )._replace(client=zero)

    def sent(examples):
        size = jax.tree.leaves(examples)[0].shape[0]
        data = group(examples, np.zeros(size, np.int32))[0]
        payload, _, _ = algorithm.client(ctx, broadcast, client_state, data)
        states = channel.init(optax.tree.zeros_like(payload))
        message = Message(payload, jnp.float32(1), jnp.float32(0))
        return channel.encode(ctx, message, *states)[0].payload

    return sent


def invert(
    observed: Payload,
    replay: Callable[[PyTree], Payload],
    start: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    distance: Callable[[Payload, Payload], jax.Array] = squared_error,
    prior: Callable[[PyTree], jax.Array] | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
) -> Inversion:
    """Looks for data whose message is the observed one, from one start.

        argmin_c  D(replay(c), observed) + R(c)

    DLG (Zhu, Liu and Han) is the squared error, minimised by `optax.lbfgs()` over
    images and logits of labels together; that of Geiping et al. the cosine distance
    with total variation as R, minimised over images in [0, 1] by `signed_adam`, where
    the labels are known, by `infer_label` or `label_counts`.

    It is a pure function of one victim and one start: vmap it over starts and take the
    `best`, and vmap that over victims.

    Args:
      observed: what was seen, such as the report of a `tap`.
      replay: `candidate -> payload`; see `replay`, or a gradient.
      start: where to begin, a pytree of float arrays.
      optimizer: any optax optimiser, one with a line search too.
      steps: how many.
      distance: D, from `(payload, observed)` to a number.
      prior: R, of what is likely; nothing by default.
      project: to what is possible, after each step, such as images in [0, 1].

    Returns:
      An `Inversion`: of all points met the one at which D + R was least.

    Raises:
      TypeError: if start has integers.
      ValueError: if steps is not positive, or replay does not make payloads shaped as
        the observed one.

    What the server saw of every client's only example, from a round of a federation:

    >>> from jaxfl import Cohort, chain, fedavg, federate, from_arrays, mean, tap
    >>> def loss(w, batch, key):
    ...     return 0.5 * jnp.sum(w["b"] + batch["x"] @ w["w"] - batch["y"], -1) ** 2
    >>> w = {"w": jnp.eye(3), "b": jnp.ones(3)}
    >>> data = from_arrays(jnp.arange(6.0).reshape(2, 3), jnp.zeros((2, 3)), [0, 1])
    >>> sgd = fedavg(loss, optax.sgd(1.0), batch_size=None)
    >>> federation = federate(sgd, chain(tap("seen"), mean()))
    >>> both = Cohort(jnp.arange(2), data, jnp.ones(2), jnp.ones(2, bool))
    >>> _, info = federation.round(jax.random.key(0), federation.init(w, data), both)
    >>> again = replay(sgd, w)
    >>> def search(seen, x):
    ...     def known(x):
    ...         return again({"x": x, "y": jnp.zeros((1, 3))})
    ...     return invert(seen, known, x, optax.lbfgs(), steps=30)
    >>> search_all = jax.jit(jax.vmap(jax.vmap(search, (None, 0)), (0, None)))
    >>> starts = jax.random.normal(jax.random.key(1), (4, 1, 3))
    >>> found = jax.vmap(best)(search_all(info.reports[0]["seen"], starts))
    >>> jnp.abs(found.candidate.round(2)).tolist()  # the examples of both
    [[[0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0]]]

    Reference: Zhu, Liu, Han 2019, arXiv:1906.08935, algorithm 1; Geiping et al. 2020,
    arXiv:2003.14053, equation 4.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}.")
    for leaf in jax.tree.leaves(start):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                "start must be of floats, which can be changed by little, got "
                f"{jnp.result_type(leaf)}; fix what is known in replay."
            )
    _check_like(jax.eval_shape(replay, start), observed)
    optimizer = optax.with_extra_args_support(optimizer)

    def objective(candidate):
        value = distance(replay(candidate), observed)
        return value if prior is None else value + prior(candidate)

    value_and_grad = jax.value_and_grad(objective)
    state = optimizer.init(start)
    # A line search has been at its last point already, unless that was moved since.
    searched = project is None and optax.tree.get(state, "grad") is not None
    if searched:
        value, grad = value_and_grad(start)
        state = optax.tree.set(state, value=value, grad=grad)

    def look(point, state):
        if searched:
            return optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        return value_and_grad(point)

    def step(carry, _):
        point, state, found = carry
        value, grad = look(point, state)
        found = _better(found, Inversion(point, value))
        updates, state = optimizer.update(
            grad, state, point, value=value, grad=grad, value_fn=objective
        )
        point = optax.apply_updates(point, updates)
        return (point if project is None else project(point), state, found), None

    nothing = Inversion(start, jnp.float32(jnp.inf))
    (point, state, found), _ = jax.lax.scan(step, (start, state, nothing), length=steps)
    return _better(found, Inversion(point, look(point, state)[0]))


def _better(a: Inversion, b: Inversion) -> Inversion:
    """The second if its loss is less, which that of no number is not."""
    return optax.tree.where(b.loss < a.loss, b, a)


def _check_like(payload: Payload, observed: Payload) -> None:
    def shapes(x):
        return jax.tree.map(jnp.shape, x)

    if shapes(payload) != shapes(observed):
        raise ValueError(
            "replay must make payloads shaped as observed, "
            f"{shapes(observed)}, but makes {shapes(payload)}."
        )


def best(found: Inversion) -> Inversion:
    """Of searches from several starts the one that came nearest to what was seen.

    Args:
      found: stacked, `[S, ...]`.

    >>> two = Inversion(jnp.array([[1.0], [2.0]]), jnp.array([0.5, 0.25]))
    >>> best(two).candidate.tolist()
    [2.0]
    """
    loss = jnp.where(jnp.isnan(found.loss), jnp.inf, found.loss)
    return jax.tree.map(lambda x: x[jnp.argmin(loss)], found)


def signed_adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam of the signs of gradients, at a tenth of the rate after 3/8, 5/8 and 7/8.

    Args:
      rate: of the first steps.
      steps: how many there will be.

    >>> x, optimizer = jnp.array([2.0, 0.0]), signed_adam(0.1, steps=8)
    >>> updates, _ = optimizer.update(x, optimizer.init(x))
    >>> updates.round(3).tolist()
    [-0.1, -0.0]

    Reference: Geiping et al. 2020, arXiv:2003.14053, section 4 and their code.
    """
    ends = {steps * k // 8: 0.1 for k in (3, 5, 7)}
    schedule = optax.piecewise_constant_schedule(rate, ends)
    return optax.chain(optax.scale_by_sign(), optax.adam(schedule))


# --------------------------------------------------------------------------- labels


def infer_label(gradient: jax.Array) -> jax.Array:
    """The label of the one example behind a gradient of the last layer.

    The loss is the cross-entropy of a softmax p, whose gradient in the bias is

        g_c = p_c - [c = y]

    of which that of the label alone is negative; and so are in the weights, times the
    layer's inputs, if those are not negative, as after a sigmoid or ReLU. It is exact
    for one example, and any positive multiple of its gradient.

    Args:
      gradient: of the bias, `[C]`, or of the weights, `[H, C]`.

    Returns:
      int32 `[]`.

    >>> infer_label(jnp.array([0.2, -0.7, 0.5])).item()
    1

    Reference: Zhao, Mopuri, Bilen 2020, arXiv:2001.02610, equation 5.
    """
    per_class = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return jnp.argmin(per_class).astype(jnp.int32)


def label_counts(
    gradient: jax.Array, examples: int, predicted: jax.Array | float | None = None
) -> jax.Array:
    """How many of the examples behind a gradient have each label.

    The mean gradient of B examples in the last bias is `g_c = p_c - n_c / B`, with p
    the mean of what is predicted for them. So a class with a negative entry is there
    at least once; the rest go one by one to the class of the lowest `g_c - p_c`, which
    each label raises by 1/B. With the true p the counts are exact.

    The update of several local steps is such a gradient once divided by the sum of
    their learning rates; p is then the mean over the steps.

    Args:
      gradient: of the last layer's bias, `[C]`.
      examples: B.
      predicted: p as the observer guesses it, `[C]`, such as the mean prediction for
        random inputs; 1/C by default.

    Returns:
      int32 `[C]`, their sum B.

    Raises:
      ValueError: if examples is not positive, or gradient not a vector.

    >>> predicted = jnp.array([0.25, 0.25, 0.5])
    >>> label_counts(predicted - jnp.array([3, 1, 0]) / 4, 4, predicted).tolist()
    [3, 1, 0]

    Reference: Wainakh et al. 2022, arXiv:2105.09369, algorithm 1 (LLG), in the bias
    rather than in the weights: there the impact of a label is exactly -1/B, and the
    offset is p.
    """
    if jnp.ndim(gradient) != 1:
        raise ValueError(
            f"gradient must be that of a bias, [C], got shape {jnp.shape(gradient)}."
        )
    if examples < 1:
        raise ValueError(f"examples must be positive, got {examples}.")
    predicted = 1 / gradient.shape[0] if predicted is None else predicted
    surely = (gradient < 0).astype(jnp.int32)

    def give(_, counts):
        left = jnp.sum(counts) < examples
        lowest = jnp.argmin(gradient - predicted + counts / examples)
        return counts.at[lowest].add(left)

    counts = jax.lax.fori_loop(0, examples, give, surely)
    # Noise can make more entries negative than there are examples.
    rank = jnp.argsort(jnp.argsort(gradient))
    few = (rank < examples).astype(jnp.int32)
    return jnp.where(jnp.sum(surely) > examples, few, counts)


# ------------------------------------------------------------- how good a picture is


def psnr(image: jax.Array, original: jax.Array) -> jax.Array:
    """Peak signal to noise ratio in dB, of images between 0 and 1.

    `-10 log10(mean (x - y)^2)`, the mean over an image.

    Args:
      image: `[..., H, W, C]`.
      original: `[..., H, W, C]`.

    Returns:
      `[...]`; infinite for the original itself.

    >>> psnr(jnp.full((8, 8, 1), 0.6), jnp.full((8, 8, 1), 0.5)).round(3).item()
    20.0
    """
    return -10 * jnp.log10(jnp.mean((image - original) ** 2, (-3, -2, -1)))


def ssim(image: jax.Array, original: jax.Array) -> jax.Array:
    """Structural similarity of images between 0 and 1.

        (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

    with means, variances and covariance under a Gaussian window of 11 x 11, of standard
    deviation 1.5, and `c_1 = 0.01^2`, `c_2 = 0.03^2`; the mean over all places at which
    the window is inside the image, and over channels.

    Args:
      image: `[..., H, W, C]`, H and W at least 11.
      original: `[..., H, W, C]`.

    Returns:
      `[...]`, 1 for the original itself.

    Raises:
      ValueError: if an image is smaller than the window.

    >>> x = jnp.linspace(0, 1, 16 * 16).reshape(16, 16, 1)
    >>> ssim(x, x).round(3).item(), ssim(1 - x, x).item() < 0
    (1.0, True)

    Reference: Wang, Bovik, Sheikh, Simoncelli 2004, doi:10.1109/TIP.2003.819861,
    equation 13.
    """
    height, width, _ = image.shape[-3:]
    if min(height, width) < _WINDOW:
        raise ValueError(
            f"image must be at least {_WINDOW} x {_WINDOW}, got {height} x {width}."
        )
    mean = functools.partial(
        jnp.einsum, "ih,jw,...hwc->...ijc", _windows(height), _windows(width)
    )
    x, y = image, original
    mx, my = mean(x), mean(y)
    sxx, syy, sxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mx * my + c1) * (2 * sxy + c2)
    likeness /= (mx * mx + my * my + c1) * (sxx + syy + c2)
    return jnp.mean(likeness, (-3, -2, -1))


_WINDOW = 11


def _windows(n: int) -> jax.Array:
    """The Gaussian at every place where it is inside n pixels, `[n - 10, n]`."""
    offset = np.arange(n) - np.arange(n - _WINDOW + 1)[:, None] - _WINDOW // 2
    weight = np.exp(-0.5 * (offset / 1.5) ** 2) * (abs(offset) <= _WINDOW // 2)
    return jnp.asarray(weight / weight.sum(1, keepdims=True), jnp.float32)


def match(images: Any, originals: Any) -> np.ndarray:
    """Which image is meant for which original, where a batch has no order.

    The assignment of the least squared error in all. On the host.

    Args:
      images: `[B, ...]`.
      originals: `[B, ...]`.

    Returns:
      int `[B]`, such that `images[order]` are like the originals.

    >>> match(np.array([[0.9], [0.1]]), np.array([[0.0], [1.0]])).tolist()
    [1, 0]

    Reference: Kuhn 1955, the Hungarian method.
    """
    from scipy.optimize import linear_sum_assignment

    images, originals = (np.reshape(x, (len(x), -1)) for x in (images, originals))
    cost = ((originals[:, None] - images[None]) ** 2).sum(-1)
    return linear_sum_assignment(cost)[1]
