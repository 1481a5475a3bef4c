"""Who foretells the remaining life of engines, and learns to while a fleet flies.

Beside its slots in the fleet every airline has one more aircraft, on which four engines
of its own are flown one after another until they fail. When one has failed, and not
before, the life that was left at each of its flights is known, and these become rows to
train on: what the nodes know grows while they train.

What is known from the start, to all, is how to standardise: means and deviations of the
inputs over all training engines, by sums over the airlines (and those of the remaining
life, in the variant of the prototype).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import maintenance_fleet, turbofan_models, turbofan_tycoon
from jaxfl import accounting, compress, data, models, privacy

SUBSETS = ("FD001", "FD003")
NEVER = np.iinfo(np.int32).max


class Engines(NamedTuple):
    """Recorded engines, each of whose rows are together and in order.

    Attributes:
      row: float32 `[E, F + 1]`, a row a flight: inputs, and the cycles that are left.
      window: int32 `[E, W]`, the rows that are looked at to judge each.
      first: int32 `[engines]`, the first row of each engine.
      life: int32 `[engines]`, how many it has.
    """

    row: Any
    window: Any
    first: Any
    life: Any


def engines_of(config) -> Engines:
    """FD001's and FD003's; with recorded lives, also those that NASA cut off."""
    tables = data.cmapss(*SUBSETS)[: 1 if config.life == "true" else 2]
    columns = data.cmapss_sensors(turbofan_models.SENSORS)
    rows, engine, before = [], [], 0
    for table in tables:
        inputs = [table["sensors"][:, columns]]
        if config.network == "tycoon":
            inputs.insert(0, table["settings"][:, :2])
        rows.append(np.column_stack(inputs))
        engine.append(before + table["engine"])
        before += 1 + table["engine"].max()
    rows, engine = np.concatenate(rows), np.concatenate(engine)
    if config.engines > before or before % config.engines:
        raise ValueError(f"engines must divide {before}, got {config.engines}.")
    every = before // config.engines
    kept = engine % every == 0
    rows, engine = rows[kept], engine[kept] // every
    life = np.bincount(engine).astype(np.int32)
    first = (np.cumsum(life) - life).astype(np.int32)
    left = (first + life)[engine] - 1 - np.arange(len(engine))
    return Engines(
        jnp.asarray(np.column_stack([rows, left]).astype(np.float32)),
        jnp.asarray(data.window_rows(engine, config.window)),
        jnp.asarray(first),
        jnp.asarray(life),
    )


class Airlines(NamedTuple):
    """Whose the engines are, for one seed.

    Attributes:
      rows: those to train on, of each airline in the order in which it will know them.
      known: int32 `[E]`, from which cycle on each is known.
      played: int32 `[G]`, the engines that are left for the fleet.
    """

    rows: jaxfl.ClientData
    known: Any
    played: Any

    def at(self, cycle: Any) -> jaxfl.ClientData:
        """What is known by that cycle, which may be traced: only sizes change."""
        rows = self.rows
        known = jnp.asarray(self.known)[rows.index] <= cycle
        before = jnp.append(0, jnp.cumsum(known, dtype=jnp.int32))
        size = before[rows.start + rows.size] - before[rows.start]
        return dataclasses.replace(rows, size=size, shortest=0)


def airlines_of(
    config, engines: Engines, examples: Any, seed: int, together: bool
) -> Airlines:
    """Five seeds between them have all engines played; none is trained on as well.

    Args:
      config: settings.
      engines: all.
      examples: what rows are of, the very same arrays for all seeds.
      seed: which of five parts is played, and how often all have been before.
      together: whether all airlines are one.
    """
    life = np.asarray(engines.life)
    whose = turbofan_tycoon.airlines(len(life), *divmod(seed, turbofan_tycoon.FOLDS))
    known = np.full(len(life), NEVER)
    for airline in range(whose.max()):
        own = np.random.default_rng((seed, airline)).permutation(
            np.flatnonzero(whose == airline)
        )
        known[own] = np.cumsum(life[own] + config.prices.failure_down)
        known[own] -= config.prices.failure_down
    played = np.flatnonzero(whose == whose.max()).astype(np.int32)
    known_row = np.repeat(known, life).astype(np.int32)
    # Counted from the end, so that the last flights are kept.
    kept = np.asarray(engines.row[:, -1]) % config.stride == 0
    nobody = 1 if together else whose.max()
    ids = np.where(together & (whose < whose.max()), 0, np.minimum(whose, nobody))
    ids = np.where(kept, np.repeat(ids, life), nobody)
    grouped = data.group(examples, ids, nobody + 1)
    order = np.lexsort((known_row, ids)).astype(np.int32)
    rows = turbofan_tycoon.part(
        dataclasses.replace(grouped, index=order), slice(nobody)
    )
    return Airlines(rows, known_row, played)


class Foreteller(NamedTuple):
    """A network that tells the life left from rows that are standardised.

    Attributes:
      model: `windows [B, W, F] -> [B, 1]`, in units and from an origin of its own.
      inputs: float32 `[E, F]`, all rows, standardised.
      origin, unit, most: the life that outputs of 0 and 1 stand for, and the longest
        that it is trained to tell; in cycles.
    """

    model: models.Model
    inputs: jax.Array
    origin: Any
    unit: Any
    most: Any

    def loss(self, params, batch, key):
        target = (jnp.minimum(batch["left"], self.most) - self.origin) / self.unit
        outputs = self.model.apply(params, self.inputs[batch["window"]], key)
        return (outputs[:, 0] - target) ** 2

    def left(self, params, window):
        """Cycles left, `[...]`, of windows of rows `[..., W]`."""
        x = self.inputs[window.reshape(-1, window.shape[-1])]
        outputs = self.model.apply(params, x)[:, 0]
        return (self.origin + self.unit * outputs).reshape(window.shape[:-1])


def foreteller_of(
    config, model: models.Model, engines: Engines, moments: jaxfl.Moments
) -> Foreteller:
    """That of one seed, whose airlines' rows have these moments."""
    inputs = moments.standardize(engines.row)[:, :-1]
    if config.network == "tycoon":
        life = moments.mean[0, -1], moments.std[0, -1], jnp.inf
    else:
        life = 0.0, turbofan_models.CAP, turbofan_models.CAP
    return Foreteller(model, inputs, *life)


def network_of(config, engines: Engines) -> models.Model:
    example = engines.row[engines.window[:1], :-1]
    if config.network == "tycoon":
        return models.from_linen(
            models.mlp((48,), 1, init=models.torch_uniform), example
        )
    return turbofan_models.model_of(config.network, example)


def channel_of(config, name: str) -> jaxfl.Channel:
    """What the updates pass: nothing, a codec, or what makes them private.

    All take part in every round, also who has no rows yet; which that is, and hence
    when somebody's engines failed, is not private.
    """
    if name == "top_k":
        codec = compress.error_feedback(compress.top_k(config.fraction))
        return jaxfl.chain(codec, jaxfl.mean())
    if name == "dp":

        def private(noise_multiplier):
            return jaxfl.chain(
                jaxfl.clip(config.clip_norm),
                jaxfl.mean(denominator=config.nodes),
                privacy.gaussian(noise_multiplier),
            )

        return private(
            accounting.calibrate(
                *(private, config.epsilon),
                population=config.nodes,
                cohort=None,
                rounds=config.cycles // config.period,
                delta=config.delta,
            )
        )
    return jaxfl.mean()


def federation_of(
    config, regime: str, channel: jaxfl.Channel, loss: Callable
) -> jaxfl.Federation:
    """How models are trained: at each airline `isolated`, `pooled`, or federated."""
    work: dict[str, Any] = {"epochs": config.epochs, "batch_size": config.batch_size}
    tycoon = config.network == "tycoon"
    sgd = optax.sgd(config.learning_rate, momentum=None if tycoon else 0.9)
    alone = sgd if tycoon else optax.adam(config.alone_rate)
    if regime == "isolated":
        algorithm = jaxfl.isolated(loss, alone, **work)
        return jaxfl.federate(algorithm, jaxfl.identity(), chunk_size=1)
    if regime == "pooled" and not tycoon:
        # As in `turbofan`: half of each pass's way, which evens out its last steps.
        work["batch_size"] = config.pooled_batch
        algorithm = jaxfl.fedavg(loss, alone, optax.sgd(0.5), **work)
    else:
        algorithm = jaxfl.fedavg(loss, sgd, **work)
    return jaxfl.federate(algorithm, channel, chunk_size=1)


class Watcher(NamedTuple):
    """Who says which engines are to be serviced, and learns between.

    Attributes:
      state: where it starts.
      learn: `(state, cycle) -> (state, bits)`, from what is known by that cycle; and
        what was sent for it.
      watch: `(state, cycle) -> Watch`.
    """

    state: Any
    learn: Callable
    watch: Callable[[Any, jax.Array], maintenance_fleet.Watch]


def steady(flights: jax.Array) -> Watcher:
    """Services engines after so many flights, and learns nothing."""
    return Watcher(
        (),
        lambda state, cycle: (state, jnp.float32(0)),
        lambda state, cycle: maintenance_fleet.after_flights(flights),
    )


def learner(
    config,
    federation: jaxfl.Federation,
    foreteller: Foreteller,
    engines: Engines,
    airlines: Airlines,
    threshold: jax.Array,
    key: jax.Array,
) -> Watcher:
    """Services engines that a model foretells to fail soon; a round is how it learns.

    Until a node's model has learnt for a while from rows (the federated one from
    anybody's), engines are serviced as by preventive maintenance.

    Args:
      config: settings.
      federation: whose clients keep models of their own, or whose model is for all.
      foreteller, engines, airlines: of one seed.
      threshold: in cycles, of a shape that broadcasts with `[..., nodes, slots]`.
      key: of the initial weights, and of the run.
    """
    init_key, run_key = jax.random.split(key)
    state = federation.init(foreteller.model.init(init_key), airlines.rows)
    own = bool(jax.tree.leaves(state.clients.algorithm))

    def learn(state, cycle):
        state, (info, _) = jaxfl.scan_rounds(
            federation, state, airlines.at(cycle), rounds=1, key=run_key
        )
        return state, jnp.sum(info.bits_up)

    def watch(state, cycle):
        def left(engine, flown):
            flight = engines.first[engine] + jnp.maximum(flown - 1, 0)
            window = engines.window[flight]  # [..., nodes, slots, W]
            if not own:
                return foreteller.left(state.params, window)
            of_nodes = jax.vmap(foreteller.left, (0, -3), -2)
            return of_nodes(state.clients.algorithm, window)

        known = airlines.at(cycle - config.warm_up * config.period).size > 0
        return maintenance_fleet.once(
            known[:, None] if own else jnp.any(known),
            maintenance_fleet.when_foretold(left, threshold),
            maintenance_fleet.after_flights(config.prices.interval),
        )

    return Watcher(state, learn, watch)
