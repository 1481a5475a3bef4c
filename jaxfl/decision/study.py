"""The runs behind the decision: every subset, set of nodes and seed as one program."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import local, plan
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.algorithms.isolated import isolated
from jaxfl.channel import identity, mean
from jaxfl.core import Channel
from jaxfl.data.federated import ClientData, client_rows, of_rows, pool, stack
from jaxfl.evaluate import fine_tuned
from jaxfl.faults.schedule import Schedule
from jaxfl.models import Model
from jaxfl.round import federate, map_clients
from jaxfl.simulate import scan_rounds

PyTree = Any
# Rows a node needs, so that two can be held out and two are left in the least subset.
FEWEST_ROWS = 4


class Scores(NamedTuple):
    """What one regime scored, of every seed and every example that was held out.

    Attributes:
      own: `[S, N, H]`, each node's model on the node's own examples; NaN past their
        number.
      overall: `[S, T]`, on the common examples; where nodes have models of their own,
        the mean over them.
    """

    own: np.ndarray
    overall: np.ndarray


@dataclasses.dataclass(frozen=True)
class Study:
    """Scores of all regimes; what `report_of` draws its conclusions from.

    Attributes:
      train: int `[N]`, examples that each node trains on.
      fractions: `[F]`, of them, in the points of the curves over examples; a node has
        `rows_at` it.
      counts: int `[M]`, nodes in the points of the curves over nodes.
      scores: with all data and all nodes; "isolated", "federated", "pooled", "tuned"
        (federated, then trained at each node for a round's steps), "dropout", and
        "private" if there is a private channel.
      by_fraction, by_count: `{regime: [S, F]}` and `{regime: [S, M]}`, curves of the
        mean on the common examples; and of the mean of the nodes on their own, as
        "isolated, own" and so on.
      bytes_up, bytes_down: of one client in the whole run, of the mean of all.
      flops: likewise.
      local_steps: of a node in a round.
    """

    train: np.ndarray
    fractions: np.ndarray
    counts: np.ndarray
    scores: dict[str, Scores]
    by_fraction: dict[str, np.ndarray]
    by_count: dict[str, np.ndarray]
    bytes_up: float
    bytes_down: float
    flops: float
    local_steps: int


class Split(NamedTuple):
    """Rows of `examples` of each node, to train on and held out."""

    train: list[np.ndarray]
    heldout: ClientData


def split(clients: ClientData, holdout: float, seed: int) -> Split:
    """Holds out a share of each client's rows at random, at least two.

    Raises:
      ValueError: if holdout is no share, or a client has too few rows.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout must be between 0 and 1, got {holdout}.")
    rows = client_rows(clients)
    few = [i for i, own in enumerate(rows) if len(own) < FEWEST_ROWS]
    if few:
        raise ValueError(
            f"clients: {len(few)} of {len(rows)} have fewer than {FEWEST_ROWS} "
            f"examples, too few to hold some out; the first is client {few[0]} with "
            f"{len(rows[few[0]])}."
        )
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(own) for own in rows]
    cut = [min(max(2, round(holdout * len(own))), len(own) - 2) for own in rows]
    kept = [own[:k] for own, k in zip(rows, cut, strict=True)]
    left = [own[k:] for own, k in zip(rows, cut, strict=True)]
    return Split(left, of_rows(clients.examples, kept))


def rows_at(train: Any, fractions: Any) -> np.ndarray:
    """Rows that each node trains on in the points of a curve, int `[F, N]`.

    >>> rows_at([3, 16], [0.125, 1.0]).tolist()  # never fewer than two
    [[2, 2], [3, 16]]
    """
    train, fractions = np.asarray(train), np.asarray(fractions)
    return np.maximum(np.minimum(train, 2), np.ceil(np.outer(fractions, train))).astype(
        int
    )


class Points(NamedTuple):
    """Runs of one program: whose data and whose participation, and the key.

    Attributes:
      seed: int `[P]`.
      data: a stack of P partitions.
      alive: bool `[P, R, N]`, who takes part in which round.
    """

    seed: np.ndarray
    data: ClientData
    alive: np.ndarray


class Plan(NamedTuple):
    """What is run: points in the order of seeds, then of fractions, then of counts."""

    fractions: np.ndarray
    counts: np.ndarray
    federated: Points
    isolated: Points
    pooled: Points


def plan_of(
    examples: PyTree,
    train: list[np.ndarray],
    *,
    rounds: int,
    seeds: int,
    fractions: Sequence[float],
    counts: Sequence[int],
    dropout: float,
    seed: int = 0,
) -> Plan:
    """Draws the subsets of each seed: of rows and of nodes, the smaller in the larger.

    A seed has F points with all nodes and shares of their rows (those of which two are
    as many rows are one), the last with all of them; M - 1 with fewer nodes; and,
    federated, one whose nodes drop out.
    """
    n = len(train)
    shares = np.unique(np.asarray(fractions, np.float64))
    rows = rows_at([len(own) for own in train], shares)
    # Of small nodes different shares may be as many rows.
    different = np.append(np.diff(rows.sum(1)) > 0, True)
    shares, rows = shares[different], rows[different]
    numbers = np.unique(np.asarray(counts))
    federated, isolated, pooled = [], [], []
    for s in range(seeds):
        rng = np.random.default_rng((seed, s))
        order = [rng.permutation(own) for own in train]
        subsets = [
            of_rows(examples, [own[:k] for own, k in zip(order, of_each, strict=True)])
            for of_each in rows
        ]
        everyone, whole = np.ones((rounds, n), bool), subsets[-1]
        rank = np.argsort(rng.permutation(n))
        some = [np.broadcast_to(rank < m, (rounds, n)) for m in numbers[:-1]]
        stay = rng.random((rounds, n)) >= dropout
        isolated += [(s, data, everyone) for data in subsets]
        federated += [(s, data, everyone) for data in subsets]
        federated += [(s, whole, alive) for alive in [*some, stay]]
        pooled += [(s, pool(data), everyone[:, :1]) for data in subsets]
        of_some = [
            of_rows(
                examples, [o for o, there in zip(order, a[0], strict=True) if there]
            )
            for a in some
        ]
        pooled += [(s, pool(data), everyone[:, :1]) for data in of_some]

    def points(each):
        seed, data, alive = zip(*each, strict=True)
        return Points(np.array(seed), stack(data), np.stack(alive))

    return Plan(shares, numbers, *map(points, (federated, isolated, pooled)))


def study(
    model: Model,
    optimizer: optax.GradientTransformation,
    clients: ClientData,
    *,
    rounds: int,
    key: jax.Array,
    score: str,
    epochs: int,
    batch_size: int,
    test: PyTree,
    heldout: ClientData | None,
    holdout: float,
    fractions: Sequence[float],
    counts: Sequence[int] | None,
    seeds: int,
    server_optimizer: optax.GradientTransformation | None,
    isolated_optimizer: optax.GradientTransformation | None,
    pooled_optimizer: optax.GradientTransformation | None,
    channel: Channel | None,
    private: Channel | None,
    dropout: float,
    chunk_size: int | None,
    at_once: int,
    mesh: jax.sharding.Mesh | None,
) -> Study:
    """All runs; see `should_i_federate`, which checks the arguments."""
    examples = jax.tree.map(jnp.asarray, clients.examples)
    clients = dataclasses.replace(clients, examples=examples)
    n = clients.num_clients
    if heldout is None:
        train, own = split(clients, holdout, seed=0)
    else:
        train, own = client_rows(clients), jax.tree.map(jnp.asarray, heldout)
    if test is None:
        rows = pool(own).index
        test = jax.tree.map(lambda a: jnp.asarray(a)[rows], own.examples)
    test = jax.tree.map(jnp.asarray, test)
    if counts is None:
        counts = [*map(int, np.unique(np.geomspace(1, n, 5).round()))]
    arranged = plan_of(
        *(examples, train),
        rounds=rounds,
        seeds=seeds,
        fractions=fractions,
        counts=counts,
        dropout=dropout,
    )
    train_sizes = np.array([len(own) for own in train])
    steps = max(1, round(epochs * train_sizes.mean() / batch_size))
    work = local.Work(batch_size=batch_size, steps=steps)
    alone = isolated_optimizer or optimizer
    personal = fine_tuned(model.loss, optimizer, **work)

    def looked_at(models, of_each, heldout, test):
        """Scores of each node's model, `[N, H]`, and of one model or of all, `[T]`."""

        def own(params, mine):
            place = jnp.arange(heldout.longest)
            each = model.metrics(params, mine.take(place))[score]
            return jnp.where(place < mine.size, each, jnp.nan)

        def common(params):
            return _in_batches(model, score, params, test)

        ranges = heldout.start, heldout.size

        def one(x):
            params, start, size = x
            params = params if of_each else models
            mine = dataclasses.replace(heldout, start=start, size=size)
            return own(params, mine), common(params) if of_each else ()

        of_nodes = models if of_each else jnp.zeros(n)
        seen, overall = jax.lax.map(one, (of_nodes, *ranges))
        return seen, overall.mean(0) if of_each else common(models)

    def lower(points: Points, algorithm, channel, kind: str):
        """The program of all runs of a kind, its arguments, and how many they are."""
        federation = federate(algorithm, channel, chunk_size=chunk_size)

        def run(shared, x):
            seed, (index, start, size), alive = x
            examples, heldout, test, key = shared
            key = jax.random.fold_in(key, seed)
            init_key, run_key, tune_key = jax.random.split(key, 3)
            data = dataclasses.replace(
                points.data, examples=examples, index=index, start=start, size=size
            )
            who = np.arange(alive.shape[-1])
            schedule = Schedule(np.tile(who, (rounds, 1)), alive=alive)
            state = federation.init(model.init(init_key), data)
            state, (info, _) = scan_rounds(
                *(federation, state, data),
                rounds=rounds,
                key=run_key,
                cohort_size=schedule,
            )
            of_each = kind == "isolated"
            models = state.clients.algorithm if of_each else state.params
            found = {
                "scores": looked_at(models, of_each, heldout, test),
                "up": info.bits_up.mean(1).sum(),
                "down": info.bits_down.mean(1).sum(),
            }
            if kind == "federated":

                def tuned(i):
                    return personal(
                        state.params, (), data[i], jax.random.fold_in(tune_key, i)
                    )

                at_home = jax.lax.map(tuned, jnp.arange(n))
                found["tuned"] = looked_at(at_home, True, heldout, test)
            return (), found

        d = points.data
        xs = points.seed, (d.index, d.start, d.size), points.alive
        count = len(points.seed)
        devices = 1 if mesh is None else mesh.size
        chunk = min(at_once, -(-count // devices))
        extra = -count % (chunk * devices)
        xs = jax.tree.map(
            lambda a: np.concatenate([a, np.repeat(a[-1:], extra, 0)]), xs
        )
        shared = examples, own, test, key
        program = jax.jit(
            lambda shared, xs: map_clients(
                run, shared, xs, chunk_size=chunk, mesh=mesh
            )[1]
        )
        return program.lower(shared, xs), (shared, xs), count

    def seen_of(compiled, arguments, count):
        found = jax.device_get(compiled(*arguments))
        return jax.tree.map(lambda a: a[:count].reshape(seeds, -1, *a.shape[1:]), found)

    f, m = len(arranged.fractions), len(arranged.counts)
    averaged = fedavg(model.loss, optimizer, server_optimizer, **work)
    together = fedavg(
        model.loss,
        pooled_optimizer or optimizer,
        # The one node does the work of all.
        **local.Work(batch_size=batch_size, steps=steps * n),
    )
    lonely = isolated(model.loss, alone, **work)
    programs = {
        "federated": (arranged.federated, averaged, channel or mean()),
        "isolated": (arranged.isolated, lonely, identity()),
        "pooled": (arranged.pooled, together, mean()),
    }
    if private is not None:
        last = np.arange(seeds) * (f + m) + f - 1
        whole, d = arranged.federated, arranged.federated.data
        picked = dataclasses.replace(
            d, index=d.index[last], start=d.start[last], size=d.size[last]
        )
        noisy = Points(whole.seed[last], picked, whole.alive[last])
        programs["private"] = noisy, averaged, private
    lowered = {name: lower(*parts, name) for name, parts in programs.items()}
    with ThreadPoolExecutor() as threads:  # to compile takes longest in small studies
        compiled = threads.map(lambda x: x[0].compile(), lowered.values())
    found = {
        name: seen_of(program, *rest)
        for program, (name, (_, *rest)) in zip(compiled, lowered.items(), strict=True)
    }
    fed, lone, pooled = (found[name] for name in ("federated", "isolated", "pooled"))

    def at(found, place, name="scores"):
        return Scores(*(x[:, place] for x in found[name]))

    scores = {
        "isolated": at(lone, f - 1),
        "federated": at(fed, f - 1),
        "pooled": at(pooled, f - 1),
        "tuned": at(fed, f - 1, "tuned"),
        "dropout": at(fed, -1),
    }
    if private is not None:
        scores["private"] = at(found["private"], 0)

    curves = {}
    for name, each in (("isolated", lone), ("federated", fed), ("pooled", pooled)):
        own, overall = each["scores"]
        curves[f"{name}, own"] = np.nanmean(own, -1).mean(-1)
        curves[name] = overall.mean(-1)
    by_fraction = {name: c[:, :f] for name, c in curves.items()}
    # Fewer nodes come after the fractions; the last point is that with all of both.
    fewer = [*range(f, f + m - 1), f - 1]
    by_count = {
        name: c[:, fewer]
        for name, c in curves.items()
        if not name.startswith("isolated")
    }
    a_round = plan.flops(
        federate(averaged, channel or mean()),
        jax.eval_shape(model.init, key),
        of_rows(examples, train),
    )
    return Study(
        train=train_sizes,
        fractions=arranged.fractions,
        counts=arranged.counts,
        scores=scores,
        by_fraction=by_fraction,
        by_count=by_count,
        bytes_up=float(fed["up"][:, f - 1].mean() / 8),
        bytes_down=float(fed["down"][:, f - 1].mean() / 8),
        flops=a_round * rounds / n,
        local_steps=steps,
    )


def _in_batches(model: Model, score: str, params, examples, batch: int = 500):
    """The score of each example, `[T]`, without all activations at once."""
    count = jax.tree.leaves(examples)[0].shape[0]
    batch = min(batch, count)
    place = jnp.arange(-(-count // batch) * batch).reshape(-1, batch) % count

    def one(rows):
        return model.metrics(params, jax.tree.map(lambda a: a[rows], examples))[score]

    return jax.lax.map(one, place).reshape(-1)[:count]
