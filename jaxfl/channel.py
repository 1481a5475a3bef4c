"""Channels: what happens to a message between a client and the server.

`chain` composes them: encode runs left to right at each client, decode right to left
at the server, so that a channel surrounds all that stand to its right.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.core import (
    Bound,
    Channel,
    Context,
    Message,
    Payload,
    PyTree,
    no_state,
    pass_on,
    send_on,
    steady,
    unbounded,
    unchanged,
)


def chain(*channels: Channel) -> Channel:
    """Composes channels: encode from the first to the last, decode back again.

    `encode = e_n ∘ ... ∘ e_1` and `decode = d_1 ∘ ... ∘ d_n`. Chains of chains are
    flattened, so that composition is associative to the last bit, random channels
    included: each layer's key is `fold_in(key, place)`.

    Args:
      *channels: any number of channels; none is the identity.

    Returns:
      A channel; its states are tuples, one entry a layer.

    Raises:
      TypeError: if an argument is not a channel.

    >>> from jaxfl import clip, mean
    >>> len(chain(clip(1.0), chain(identity(), mean())).layers)
    2
    """
    for i, channel in enumerate(channels):
        if not isinstance(channel, Channel):
            raise TypeError(f"channels[{i}] must be a jaxfl.Channel, got {channel!r}.")
    layers = [
        layer
        for channel in channels
        for layer in ((channel,) if channel.layers is None else channel.layers)
    ]
    if len(layers) == 1:
        return layers[0]

    def init(payload):
        states = []
        for layer in layers:
            states.append(layer.init(payload))
            payload = layer.sends(payload)
        return tuple(s for s, _ in states), tuple(c for _, c in states)

    def sends(payload):
        return functools.reduce(lambda x, layer: layer.sends(x), layers, payload)

    def encode(ctx, message, server_state, client_state):
        states, reports = [], []
        bounds = _bounds(layers, ctx.bound or Bound())
        for i, layer in enumerate(layers):
            message, state, report = layer.encode(
                at_layer(ctx, i, bounds[i]), message, server_state[i], client_state[i]
            )
            states.append(state)
            reports.append(report)
        return message, tuple(states), tuple(reports)

    def decode(ctx, payload, server_state, report):
        states = list(server_state)
        moved = _sensitivities(layers, ctx.bound or Bound())
        for i, layer in reversed(list(enumerate(layers))):
            payload, states[i] = layer.decode(
                at_layer(ctx, i, moved[i]), payload, server_state[i], report[i]
            )
        return payload, tuple(states)

    return Channel(
        *(init, encode, decode, tuple(layers)),
        of_sums=any(layer.of_sums for layer in layers),
        sends=sends,
        bound=lambda bound: _bounds(layers, bound)[-1],
        sensitivity=lambda bound: _sensitivities(layers, bound)[-1],
    )


def at_layer(ctx: Context, layer: int, bound: Bound) -> Context:
    """The context of one layer, whose keys are its own."""
    return ctx._replace(
        key=jax.random.fold_in(ctx.key, layer),
        shared_key=jax.random.fold_in(ctx.shared_key, layer),
        bound=bound,
    )


def _bounds(layers, bound: Bound) -> list[Bound]:
    """Of the message that comes to each layer, and last of that which leaves all."""
    bounds = [bound]
    for layer in layers:
        bounds.append(layer.bound(bounds[-1]))
    return bounds


def _sensitivities(layers, bound: Bound) -> list[Bound]:
    """To one client, of the aggregate that comes to each layer, and last of that which
    leaves all, if what comes to the last layer is within a bound."""
    moved = [bound]
    for layer in reversed(layers):
        moved.append(layer.sensitivity(moved[-1]))
    return [*moved[-2::-1], moved[-1]]


def mechanisms(channel: Channel, summed: bool = True) -> list:
    """The mechanisms of all layers that add noise, in the order of the chain.

    Args:
      channel: a chain, or one layer.
      summed: whether the aggregator makes a sum of the messages.

    Raises:
      ValueError: if noise is added to what nothing bounds.
    """
    layers = (channel,) if channel.layers is None else channel.layers
    bounds = _bounds(layers, Bound())
    moved = _sensitivities(layers, bounds[-1] if summed else Bound())
    return [
        layer.mechanism(bound, sensitivity)
        for layer, bound, sensitivity in zip(layers, bounds, moved, strict=False)
        if layer.mechanism is not None
    ]


def identity() -> Channel:
    """The channel that changes nothing, `chain()`.

    >>> identity().layers
    ()
    """
    return chain()


def mean(denominator: float | None = None) -> Channel:
    """Weights on, sum, weights off: the weighted mean of what was sent.

    `sum_{i in S} w_i x_i / sum_{i in S} w_i`, or with a fixed denominator
    `sum_{i in S} x_i / denominator`. It is a channel, so that what stands to its left
    acts on a client's own update and what stands to its right on its weighted share.
    When nobody sends, the mean is 0. Under differential privacy only the latter will
    do: weights are data that nothing bounds, so that one client may move the former as
    far as it likes.

    Client sends: its payload times its weight, in the payload's dtype, and the weight.
    Server sees: both. Bits: 32 more, for the weight (none with a fixed denominator).

    Args:
      denominator: a positive constant in place of the weights, as needed where the
        sum's sensitivity must not depend on who takes part.

    Raises:
      TypeError: when a payload has integers, which a weight would truncate.
      ValueError: if denominator is not positive; by `federate`, with an aggregator
        that makes no sum, such as a median: it would be of weighted shares.

    >>> from jaxfl.core import Message
    >>> update = Message(jnp.array([2.0, 4.0]), jnp.float32(3.0), jnp.float32(64.0))
    >>> message, _, report = mean().encode(None, update, (), ())
    >>> message.payload.tolist(), message.header.item(), report["weight"].item()
    ([6.0, 12.0], 32.0, 3.0)
    >>> payload, _ = mean().decode(None, message.payload, (), report)
    >>> payload.tolist()  # of one client: its own update again
    [2.0, 4.0]

    Reference: McMahan et al. 2017, arXiv:1602.05629, algorithm 1; with a denominator,
    McMahan et al. 2018, arXiv:1710.06963, estimator f_f.
    """
    init = tree.of_floats("mean", no_state)
    if denominator is not None:
        if isinstance(denominator, int | float) and not denominator > 0:
            raise ValueError(f"denominator must be positive, got {denominator}.")

        def divide(ctx, payload, server_state, report):
            return tree.scale(1.0 / jnp.float32(denominator), payload), server_state

        def share(bound):
            return Bound(bound.l2 / denominator, bound.l1 / denominator)

        return Channel(
            *(init, send_on, divide),
            of_sums=True,
            bound=unchanged,
            sensitivity=share,
        )

    def encode(ctx, message, server_state, client_state):
        message = message._replace(
            payload=tree.scale(message.weight, message.payload),
            header=message.header + 32.0 * (message.weight > 0),
        )
        return message, client_state, {"weight": message.weight}

    def decode(ctx, payload, server_state, report):
        weight = report["weight"]
        average = tree.divide(payload, jnp.where(weight > 0, weight, 1.0))
        return tree.mask(weight > 0, average), server_state

    return Channel(init, encode, decode, of_sums=True)


def gate(
    should_send: Callable[[Context, Payload], jax.Array], *, keep: bool
) -> Channel:
    """Sends a message only if a predicate of its payload holds.

    Client sends: one bit that says whether a message follows, and the message if so.
    Server sees: who sent.

    Args:
      should_send: `(ctx, payload) -> bool []`.
      keep: whether what is withheld is added to the client's next payload, before the
        predicate sees it, or dropped.

    >>> from jaxfl.core import Message
    >>> big = gate(lambda ctx, payload: optax.tree.norm(payload) > 1.0, keep=True)
    >>> small = Message(jnp.array([0.75]), jnp.float32(5.0), jnp.float32(32.0))
    >>> _, kept = big.init(small.payload * 0)
    >>> message, kept, _ = big.encode(None, small, (), kept)
    >>> message.weight.item(), message.bits.item(), message.header.item()
    (0.0, 0.0, 1.0)
    >>> message, kept, _ = big.encode(None, small, (), kept)
    >>> message.payload.tolist(), message.weight.item(), kept.tolist()
    ([1.5], 5.0, [0.0])
    """

    def decide(ctx, payload, server_state):
        return should_send(ctx, payload), {}

    return gate_by(decide, keep=keep)


def gate_by(
    decide: Callable,
    *,
    keep: bool,
    init: Callable = lambda payload: (),
    decode: Callable = pass_on,
) -> Channel:
    """A gate that reports what it decides by, and may look at a state of the server.

    Args:
      decide: `(ctx, payload, server_state) -> (bool [], report)`.
      keep: see `gate`.
      init: `payload -> server_state`.
      decode: as a channel's.
    """

    def both(payload):
        return init(payload), payload if keep else ()

    def encode(ctx, message, server_state, kept):
        message = with_kept(message, kept)
        send, report = decide(ctx, message.payload, server_state)
        send &= message.weight > 0
        if jax.tree.leaves(kept):
            kept = tree.mask(~send, message.payload)
        message = message._replace(
            weight=jnp.where(send, message.weight, 0.0),
            bits=jnp.where(send, message.bits, 0.0),
            header=jnp.where(send, message.header, 0.0) + 1.0,
        )
        return message, kept, report | {"open": send}

    return Channel(
        *(both, encode, decode),
        bound=unbounded if keep else unchanged,
        sensitivity=unchanged if decode is pass_on else unbounded,
    )


def with_kept(message: Message, kept: Payload) -> Message:
    """A message with what was kept from before; `kept` is `()` if nothing ever is."""
    if not jax.tree.leaves(kept):
        return message
    return message._replace(payload=optax.tree.add(message.payload, kept))


def tap(name: str = "tap") -> Channel:
    """Changes nothing and reports every payload as it stands here: an eavesdropper.

    What passed is in `info.reports`, stacked `[K, ...]`; place it where the observer
    stands. It costs the memory of K payloads.

    Args:
      name: the key of the report.

    >>> from jaxfl.core import Message
    >>> update = Message(jnp.array([2.0]), jnp.float32(1.0), jnp.float32(32.0))
    >>> _, _, report = tap("wire").encode(None, update, (), ())
    >>> report["wire"].tolist()
    [2.0]
    """

    def encode(ctx, message, server_state, client_state):
        return message, client_state, {name: message.payload}

    return Channel(encode=encode, bound=unchanged, sensitivity=unchanged)


def on(part: str | Callable[[str], bool], channel: Channel) -> Channel:
    """Applies a channel to one entry of a payload, or to some of its arrays.

    The inner channel sees a message of that part alone. If it withholds it, zeros go
    in its place and the rest of the message is sent as before; another change of its
    weight is the inner channel's own affair. The part's bits are counted as those of
    its arrays, so put `on` left of any codec of the whole, and one on a part.

    Args:
      part: the key of an entry, of a payload that is a dictionary; or a predicate of
        an array's path, such as "params/Dense_0/kernel": the inner channel then sees a
        dictionary of the arrays that are chosen, by path, and must send one as well.
      channel: what to do with it.

    Raises:
      TypeError: when the payload is not a dictionary; when the channel does not send an
        array for each that is chosen.
      ValueError: when it has no such entry, or no array is chosen.

    >>> from jaxfl import clip
    >>> from jaxfl.core import Message
    >>> payload = {"model": jnp.array([3.0, 4.0]), "control": jnp.array([9.0])}
    >>> update = Message(payload, jnp.float32(1.0), jnp.float32(96.0))
    >>> message, _, _ = on("model", clip(0.5)).encode(None, update, (), ())
    >>> jax.tree.map(lambda x: x.round(3).tolist(), message.payload)
    {'control': [9.0], 'model': [0.3, 0.4]}
    >>> kernels = on(lambda path: path.endswith("kernel"), clip(0.5))
    >>> payload = {"dense": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([9.0])}}
    >>> message, _, _ = kernels.encode(None, update._replace(payload=payload), (), ())
    >>> jax.tree.map(lambda x: x.round(3).tolist(), message.payload)
    {'dense': {'bias': [9.0], 'kernel': [0.3, 0.4]}}
    """
    check, take, put = _entry(part) if isinstance(part, str) else _arrays(part)

    def init(payload):
        check(payload, channel)
        return channel.init(take(payload))

    def encode(ctx, message, server_state, client_state):
        entry = take(message.payload)
        inner, client_state, report = encode_part(
            channel, ctx, entry, message.weight, server_state, client_state
        )
        plain = jnp.where(message.weight > 0, jnp.float32(tree.num_bits(entry)), 0.0)
        message = message._replace(
            payload=put(message.payload, inner.payload),
            bits=message.bits - plain + inner.bits,
            header=message.header + inner.header,
        )
        return message, client_state, report

    def decode(ctx, payload, server_state, report):
        entry, server_state = channel.decode(ctx, take(payload), server_state, report)
        return put(payload, entry), server_state

    def sends(payload):
        return put(payload, channel.sends(take(payload)))

    return Channel(init, encode, decode, of_sums=channel.of_sums, sends=sends)


def _entry(key: str):
    """How to check for, take and put an entry of a dictionary."""

    def check(payload, channel):
        if not isinstance(payload, dict):
            raise TypeError(f"on({key!r}): payload must be a dict, got {payload!r}.")
        if key not in payload:
            raise ValueError(f"on({key!r}): payload has only {sorted(payload)}.")

    def put(payload, entry):
        return payload | {key: entry}

    return check, operator.itemgetter(key), put


def _arrays(chosen: Callable[[str], bool]):
    """How to check for, take and put the arrays whose path is chosen."""

    def take(payload):
        return {path: x for path, x in tree.named(payload).items() if chosen(path)}

    def check(payload, channel):
        if not take(payload):
            raise ValueError(f"on: part chooses none of {[*tree.named(payload)]}.")
        sent = jax.eval_shape(channel.sends, take(payload))
        if jax.tree.structure(sent) != jax.tree.structure(take(payload)):
            raise TypeError("on: channel must send one array for each that is chosen.")

    return check, take, tree.with_named


def encode_part(
    channel: Channel, ctx: Context, part: Payload, weight, server_state, client_state
) -> tuple[Message, PyTree, PyTree]:
    """A channel's encode of a part of a payload: if withheld, zeros go in its place."""
    bits = jnp.where(weight > 0, jnp.float32(tree.num_bits(part)), 0.0)
    message, client_state, report = channel.encode(
        ctx, Message(part, weight, bits), server_state, client_state
    )
    sent = message.weight > 0
    message = message._replace(payload=tree.mask(sent, message.payload))
    return message, client_state, tree.mask(sent, report)


def at_client(transform: optax.GradientTransformation) -> Channel:
    """Any optax transformation of each message; its state stays with the client.

    A random key in the transformation's state is made each client's own, by folding
    its population id in; it comes from the transformation's seed, not from the run's.

    Args:
      transform: for instance `optax.add_noise(...)`, `optax.trace(0.9)`.

    >>> halve = at_client(optax.scale(0.5))
    >>> from jaxfl.core import Message
    >>> full = Message(jnp.array([2.0]), jnp.float32(1.0), jnp.float32(32.0))
    >>> message, _, _ = halve.encode(None, full, *halve.init(full.payload))
    >>> message.payload.tolist()
    [1.0]
    """

    def init(payload):
        return (), transform.init(payload)

    def encode(ctx, message, server_state, client_state):
        payload, client_state = transform.update(message.payload, client_state)
        return message._replace(payload=payload), client_state, ()

    return Channel(init, encode, sensitivity=unchanged)


def at_server(transform: optax.GradientTransformation) -> Channel:
    """Any optax transformation of the aggregate, where it passes here.

    Privatizers of jax_privacy (matrix mechanisms) are such transformations.

    Args:
      transform: for instance `optax.ema(0.9)`.

    >>> momentum = at_server(optax.trace(0.5))
    >>> total = jnp.array([1.0])
    >>> state, _ = momentum.init(total)
    >>> for _ in range(3):
    ...     payload, state = momentum.decode(None, total, state, ())
    >>> payload.tolist()  # 1 + 1/2 + 1/4
    [1.75]
    """

    def init(payload):
        return transform.init(payload), ()

    def decode(ctx, payload, server_state, report):
        return transform.update(payload, server_state)

    return Channel(init, decode=decode, bound=unchanged, sensitivity=steady)
