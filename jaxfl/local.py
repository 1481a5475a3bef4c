"""Local training: what one client does between a broadcast and a message."""

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import tree
from jaxfl.core import Context, Metrics, Params
from jaxfl.data.federated import ClientData

PyTree = Any
Gradient = Callable[[Params, PyTree, jax.Array, jax.Array], tuple[jax.Array, Params]]


class Differentiated(NamedTuple):
    """A loss that comes with a gradient of its own; algorithms take it for a loss.

    Attributes:
      gradient: `(params, batch, mask [B], key) -> (mean loss, gradient)`.
      statistics: whether the parameters are a `Normalised`, of whose statistics not
        every algorithm can say what becomes of them.
    """

    gradient: Gradient
    statistics: bool = False


Loss = Callable[[Params, PyTree, jax.Array], jax.Array] | Differentiated


def gradient(loss: Loss, *, statistics: bool = False) -> Gradient:
    """The mean loss of a batch's real examples, and its gradient.

    `F(w) = sum_b m_b f(w; z_b) / sum_b m_b`, with `m_b` 0 for the rows that only fill
    up a ragged client's last batch.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example; or a
        `Differentiated`, which has its own.
      statistics: True where gradients go nowhere but into `train`, and models are
        averaged as they are, so that those of a `Normalised` are in good hands.

    Returns:
      `(params, batch, mask [B], key) -> (mean loss, gradient)`.

    Raises:
      TypeError: if the loss has statistics that are not allowed; when it is called and
        does not return one number an example.
    """
    if isinstance(loss, Differentiated):
        if loss.statistics and not statistics:
            raise TypeError(
                "loss: its model has batch statistics, of which this algorithm does "
                "not say what becomes of them. Use GroupNorm or LayerNorm, or fedavg, "
                "fedprox, fedper, ditto, ifca, isolated or local_models."
            )
        return loss.gradient

    def mean_loss(params, batch, mask, key):
        return _mean_of_real(loss(params, batch, key), mask)

    return jax.value_and_grad(mean_loss)


def _mean_of_real(losses: jax.Array, mask: jax.Array) -> jax.Array:
    require_one_each(losses, mask.size)
    return jnp.sum(jnp.where(mask, losses, 0)) / jnp.maximum(jnp.sum(mask), 1)


class Normalised(NamedTuple):
    """The parameters of a model with batch normalisation.

    Attributes:
      params: what is trained.
      statistics: running means and variances, which no optimiser moves: `train` gives
        them what the batches make of them, see `beside_statistics`. A channel takes
        them for numbers like all others: they are compressed, clipped and noised with
        the rest, and a variance to which noise was added may be negative. With noise
        use GroupNorm or LayerNorm, or keep them at home, see `fedper`.
    """

    params: Params
    statistics: PyTree


def normalised(
    loss: Callable[
        [Params, PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]
    ],
) -> Differentiated:
    """The loss of a model whose running statistics s follow those of its batches.

    The gradient of `F(w, s)` is that of w; in the place of one of s it has `s - s'`,
    where s' is what the batch makes of s. A batch in which no example is real leaves
    them as they are.

    Args:
      loss: `(params, statistics, batch, mask [B], key) -> (losses [B], statistics)`;
        rows whose mask is False must not enter the statistics. At least one is True.

    Returns:
      What algorithms take for a loss; their parameters are a `Normalised`.

    >>> def centred(w, running, batch, mask, key):
    ...     mean = jnp.mean(batch, where=mask)
    ...     return w * (batch - mean) ** 2, 0.9 * running + 0.1 * mean
    >>> batch, mask = jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])
    >>> start = Normalised(jnp.float32(1.0), jnp.float32(0.0))
    >>> value, (slope, move) = normalised(centred).gradient(start, batch, mask, None)
    >>> value.item(), slope.item(), round(move.item(), 3)
    (1.0, 1.0, -0.2)
    """

    def gradient(model, batch, mask, key):
        params, old = model
        some = jnp.any(mask)

        def mean_loss(params):
            losses, new = loss(params, old, batch, mask | ~some, key)
            return _mean_of_real(losses, mask), new

        (value, new), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        moves = jax.tree.map(
            lambda s, t: jnp.where(some, s - t, 0).astype(s.dtype), old, new
        )
        return value, Normalised(grads, moves)

    return Differentiated(gradient, statistics=True)


def beside_statistics(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The same optimiser, which leaves the statistics of a `Normalised` to themselves.

    It sees no gradient of theirs, and whatever it would do to them, such as decay or
    momentum, is not done: they move by what stands in the gradient's place, at the rate
    1. At a client that is to what its batch made of them, at the server to the clients'
    mean. `train` and the servers of `fedavg` do this to every optimiser; one for a
    model without statistics is what it was.

    >>> adam = beside_statistics(optax.adamw(0.1))
    >>> model = Normalised(jnp.float32(1.0), jnp.float32(4.0))
    >>> grads = Normalised(jnp.float32(7.0), jnp.float32(0.5))
    >>> updates, _ = adam.update(grads, adam.init(model), model)
    >>> updates.params.round(3).item(), updates.statistics.item()
    (-0.1, -0.5)
    """

    def is_normalised(x):
        return isinstance(x, Normalised)

    def still(x):
        if not is_normalised(x):
            return x
        return x._replace(statistics=optax.tree.zeros_like(x.statistics))

    def follow(x, moved):
        if not is_normalised(x):
            return moved
        return moved._replace(statistics=optax.tree.scale(-1, x.statistics))

    def update(updates, state, params=None):
        seen = jax.tree.map(still, updates, is_leaf=is_normalised)
        moved, state = optimizer.update(seen, state, params)
        return jax.tree.map(follow, updates, moved, is_leaf=is_normalised), state

    return optax.GradientTransformation(optimizer.init, update)


def only(
    optimizer: optax.GradientTransformation, chosen: Callable[[str], bool]
) -> optax.GradientTransformation:
    """The same optimiser, for a part of the model; the rest does not move.

    Args:
      optimizer: any optax optimiser, which sees that part alone.
      chosen: `path -> bool`, of a parameter such as "Dense_2/kernel", or
        "params/Dense_2/kernel" of a `Normalised`.

    Raises:
      ValueError: in `init`, if all parameters are chosen, or none.

    >>> body = only(optax.sgd(1.0), lambda path: path != "head")
    >>> grads = {"body": jnp.float32(2.0), "head": jnp.float32(3.0)}
    >>> updates, _ = body.update(grads, body.init(grads))
    >>> updates["body"].item(), updates["head"].item()
    (-2.0, 0.0)
    """

    def label(params):
        labels = {p: bool(chosen(p)) for p in tree.named(params)}
        if len(set(labels.values())) != 2:
            which = "all" if all(labels.values()) else "none"
            raise ValueError(f"chosen chooses {which} of {[*labels]}.")
        return tree.with_named(params, labels)

    return optax.partition({True: optimizer, False: optax.set_to_zero()}, label)


def require_one_each(losses: jax.Array, size: int) -> None:
    """Raises TypeError unless there is one loss for each of so many examples."""
    if jnp.shape(losses) != (size,):
        raise TypeError(
            f"loss must return one loss for each example, shape {(size,)}, "
            f"got shape {jnp.shape(losses)}; jaxfl takes the mean itself."
        )


def tilted(gradient: Gradient, direction: Params) -> Gradient:
    """The gradient of `F(w) + <direction, w>`: a correction that stays as it is.

    Args:
      gradient: see `gradient`.
      direction: shaped as the parameters.

    >>> slope = gradient(lambda w, batch, key: 0.5 * (w - batch) ** 2)
    >>> batch, mask = jnp.array([1.0, 3.0]), jnp.array([True, True])
    >>> tilted(slope, jnp.float32(5.0))(jnp.float32(0.0), batch, mask, None)[1].item()
    3.0
    """

    def corrected(params, batch, mask, key):
        value, grads = gradient(params, batch, mask, key)
        return value, optax.tree.add(grads, direction)

    return corrected


def proximal(
    mu: float | jax.Array, centre: Params | None = None
) -> optax.GradientTransformation:
    """Draws a client to a model: adds `mu (w - centre)` to its gradient.

    As the first of a chain, `optax.chain(proximal(mu), optax.sgd(0.1))`, it makes any
    client optimiser minimise `F_k(w) + mu/2 ||w - centre||^2`.

    Args:
      mu: at least 0; may be traced.
      centre: shaped as the parameters; where the client began, if None.

    Raises:
      ValueError: if mu is negative.

    >>> start = jnp.float32(1.0)
    >>> transform = proximal(0.5)
    >>> transform.update(jnp.float32(0.0), transform.init(start), start + 2.0)[0].item()
    1.0
    """
    if isinstance(mu, int | float) and not mu >= 0:
        raise ValueError(f"mu must be at least 0, got {mu}.")

    def init(params):
        return params if centre is None else ()

    def update(updates, state, params=None):
        pull = optax.tree.sub(params, state if centre is None else centre)
        pulled = jax.tree.map(lambda g, d: (g + mu * d).astype(g.dtype), updates, pull)
        return pulled, state

    return optax.GradientTransformation(init, update)


def full_gradient(
    key: jax.Array,
    gradient: Gradient,
    params: Params,
    data: ClientData,
    **work: Unpack["Work"],
) -> tuple[jax.Array, Params]:
    """The mean loss of all of a client's examples, and its gradient.

    Args:
      key: for losses that draw.
      gradient: see `gradient`.
      params: where.
      data: ONE client's examples; without any both are 0.
      **work: as given to `train`, of which its `batch_size` are looked at at a time.

    Returns:
      `F_k(params)`, and its gradient, in the dtypes that `gradient` gives.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(jnp.zeros(3), jnp.array([1.0, 2.0, 6.0]), [0, 0, 0])
    >>> slope = gradient(lambda w, batch, key: 0.5 * (w - batch["y"]) ** 2)
    >>> value, grads = full_gradient(
    ...     jax.random.key(0), slope, jnp.float32(0.0), data[0], batch_size=2)
    >>> round(value.item(), 3), grads.item()
    (6.833, -3.0)
    """
    longest, batch = _longest_and_batch(data, **work)

    def on_batch(i, carry):
        place = i * batch + jnp.arange(batch)
        mask = place < data.size
        got = gradient(params, data.take(place), mask, jax.random.fold_in(key, i))
        share = jnp.sum(mask) / jnp.maximum(data.size, 1)
        return jax.tree.map(
            lambda total, x: total + (share * x).astype(x.dtype), carry, got
        )

    shapes = jax.eval_shape(
        gradient, params, data.take(jnp.arange(batch)), jnp.ones(batch, bool), key
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, -(-longest // batch), on_batch, zeros)


class Work(TypedDict, total=False):
    """How a client works in a round: options that every local trainer shares.

    Attributes:
      batch_size: B, examples a step; None for all of the client's at once; 32 if not
        given.
      epochs: E, passes over the client's data in a round; 1 unless `steps` is given.
      steps: steps in a round instead, the same number for every client, over as many
        passes as that needs. The orders of as many passes as the smallest client
        needs are drawn for every client.
      poisson: True to draw every example for every step by itself, with probability
        B / n, in place of passes over them. Batches are of B examples on average; each
        has room for as many as the longest client has, and a gradient is computed for
        all of that, unless by `privacy.dp_sgd` in microbatches.
      shuffle: False to go through the examples in the order in which they are kept.
      probe: `params -> values`, to look inside the round.
      probes: how often, at equal distances, the last time after the last step; 5 if
        not given.
    """

    batch_size: int | None
    epochs: int | None
    steps: int | None
    poisson: bool
    shuffle: bool
    probe: Callable[[Params], PyTree] | None
    probes: int


class Trained(NamedTuple):
    """What local training gives.

    Attributes:
      params: the client's model after its last step.
      metrics: `{"loss": float32 [], "steps": int32 []}`, the mean over the steps of
        the training loss (NaN if there were none) and their number; and, if probed,
        `"probe"`, what the probe gave, `[probes, ...]`.
    """

    params: Params
    metrics: Metrics


def train(
    ctx: Context,
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    params: Params,
    data: ClientData,
    **work: Unpack[Work],
) -> Trained:
    """Minimises a client's own loss by minibatch steps, the optimiser begun afresh.

    Each pass over the client's n examples goes in a new random order, in ceil(n / B)
    batches of which the last may be smaller. A client without examples takes no step.

    A client that does a share of its work (`ctx.share`) stops after so many of its
    steps, to the nearest whole one, and has done the same as one that goes on.

    Where every client has as many examples the number of steps is static and the loop
    can be differentiated in reverse; ragged clients, and those with a share, each stop
    at their own last step (forward-mode derivatives only).

    Args:
      ctx: of this client in this round; `core.lone_context` outside any round.
      gradient: `(params, batch, mask, key) -> (loss, gradient)`, see `gradient`.
      optimizer: any optax optimiser; the statistics of a `Normalised` are not its
        business, see `beside_statistics`.
      params: where to start.
      data: ONE client's examples.
      **work: how much and how, see `Work`.

    Returns:
      A `Trained`.

    Raises:
      TypeError: if ctx is no `Context`, or data not one client's `ClientData`.
      ValueError: if both epochs and steps are given, or a number is not positive.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(jnp.zeros(5), jnp.arange(5.0), client_ids=[0, 0, 0, 1, 1])
    >>> slope = gradient(lambda w, batch, key: 0.5 * (w - batch["y"]) ** 2)
    >>> from jaxfl.core import lone_context
    >>> trained = train(
    ...     lone_context(jax.random.key(0)), slope, optax.sgd(0.5), jnp.float32(0),
    ...     data[1], batch_size=None, epochs=2)
    >>> trained.params.item(), trained.metrics["steps"].item()  # y is 3 and 4
    (2.625, 2)
    """
    check_work(**work)
    optimizer = beside_statistics(optimizer)
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx must be the client's jaxfl.Context, got {ctx!r}.")
    if not isinstance(data, ClientData) or jnp.ndim(data.start) != 0:
        raise TypeError(f"data must be the ClientData of one client, got {data!r}.")
    longest, batch = _longest_and_batch(data, **work)
    size = data.size if data.static_size is None else data.static_size
    per_pass = -(-size // batch)  # an int where clients are alike, else traced

    steps = work.get("steps")
    if steps is None:
        passes = work.get("epochs") or 1
        total = passes * per_pass
    else:
        passes = -(-steps // max(1, -(-data.shortest // batch)))
        total = steps if data.shortest else jnp.where(data.size > 0, steps, 0)
    if ctx.share is not None:
        total = jnp.round(ctx.share * total).astype(jnp.int32)
    order_key, step_key = jax.random.split(ctx.key)
    order = _orders(order_key, data, passes, batch, work.get("shuffle", True))

    def in_passes(i):
        place = i % _at_least_one(per_pass) * batch + jnp.arange(batch)
        return order[i // _at_least_one(per_pass), place], place < data.size

    def each_by_itself(i):
        place = jnp.arange(longest)
        draw = jax.random.uniform(jax.random.fold_in(order_key, i), (longest,))
        taken = (draw * data.size < batch) & (place < data.size)
        return jnp.argsort(~taken, stable=True), place < jnp.sum(taken)

    choose = each_by_itself if work.get("poisson") else in_passes

    def step(i, carry):
        params, state, loss = carry
        rows, mask = choose(i)
        value, grads = gradient(
            params, data.take(rows), mask, jax.random.fold_in(step_key, i)
        )
        updates, state = optimizer.update(_at_once(grads), state, params)
        loss = loss + value.astype(jnp.float32)
        return optax.apply_updates(params, updates), state, loss

    carry = params, optimizer.init(params), jnp.float32(0)
    seen, probe = {}, work.get("probe")
    if probe is None:
        carry = jax.lax.fori_loop(0, total, step, carry)
    else:
        values, probes = [], work.get("probes", 5)
        for j in range(probes):
            bounds = j * total // probes, (j + 1) * total // probes
            carry = jax.lax.fori_loop(*bounds, step, carry)
            values.append(probe(carry[0]))
        seen = {"probe": jax.tree.map(lambda *x: jnp.stack(x), *values)}
    total = jnp.asarray(total, jnp.int32)
    params, _, loss = carry
    return Trained(params, {"loss": loss / total, "steps": total, **seen})


def check_work(**work: Unpack[Work]) -> None:
    """Raises, before anything compiles, unless these options make sense together."""
    unknown = sorted(set(work) - set(Work.__annotations__))
    if unknown:
        raise TypeError(
            f"unknown options {unknown}; there are {[*Work.__annotations__]}."
        )
    epochs, steps = work.get("epochs"), work.get("steps")
    if epochs is not None and steps is not None:
        raise ValueError(f"give epochs or steps, not both: got {epochs=} and {steps=}.")
    if work.get("poisson") and not work.get("shuffle", True):
        raise ValueError("poisson: such batches have no order; leave shuffle out.")
    for name in ("batch_size", "epochs", "steps", "probes"):
        value = work.get(name)
        if value is not None and (not isinstance(value, Integral) or int(value) < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def num_steps(data: ClientData, **work: Unpack[Work]) -> np.ndarray:
    """How many steps `train` takes at each client in a round, int64 `[N]`.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(jnp.zeros(5), jnp.zeros(5), client_ids=[0, 0, 0, 1, 1])
    >>> num_steps(data, batch_size=2, epochs=3).tolist()
    [6, 3]
    """
    check_work(**work)
    size, steps = np.asarray(data.size, np.int64), work.get("steps")
    if steps is not None:
        return np.where(size > 0, steps, 0)
    _, batch = _longest_and_batch(data, **work)
    return (work.get("epochs") or 1) * -(-size // batch)


def _longest_and_batch(data: ClientData, **work: Unpack[Work]) -> tuple[int, int]:
    """How many examples the longest client has, and how many there are in a batch."""
    longest = max(1, data.longest)
    return longest, min(work.get("batch_size", 32) or longest, longest)


def _at_once(grads: PyTree) -> PyTree:
    """The same gradients, none of which is ready before all of them are.

    While a weight is still to be read for the gradient of a layer below it cannot be
    updated in place, so XLA's CPU compiler copies it, in every step. A zero that
    depends on every gradient, and that no compiler can see to be zero, says that an
    update never comes before the last of them: a fifth of a step of the CNN. On a GPU
    it would keep the update out of the kernel that makes the gradient.
    """
    if jax.default_backend() != "cpu":
        return grads
    firsts = [jnp.abs(g[(0,) * g.ndim]) for g in jax.tree.leaves(grads) if g.size]
    zero = jnp.nan_to_num(sum(jnp.minimum(x, 0) for x in firsts))
    return jax.tree.map(lambda g: g - zero.astype(g.dtype), grads)


def _at_least_one(n):
    return max(1, n) if isinstance(n, int) else jnp.maximum(1, n)


def _orders(key, data: ClientData, passes: int, batch: int, shuffle: bool):
    """The order of each pass, `[passes, whole batches]`: the client's rows first."""
    width = max(1, -(-data.longest // batch)) * batch
    place = jnp.arange(width, dtype=jnp.int32)
    if not shuffle or width == batch:  # one batch has no order
        return jnp.broadcast_to(place, (passes, width))

    def one(key):
        draw = jax.random.bits(key, (width,))
        # a stable sort that keeps what is no row of this client behind its rows
        draw = jnp.where(place < data.size, draw, jnp.uint32(0xFFFFFFFF))
        return jnp.argsort(draw, stable=True)

    return jax.vmap(one)(jax.random.split(key, passes))
