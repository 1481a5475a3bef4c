"""Whole runs: rounds as scans on the device, and the host's part between them."""

import contextlib
import functools
import numbers
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfl.core import Cohort, Data, Federation, Info, Params, State
from jaxfl.data.federated import ClientData
from jaxfl.history import History, concatenate
from jaxfl.round import population_size, select_clients

PyTree = Any
Evaluate = Callable[[State], dict[str, jax.Array]]


def sample_cohort(
    key: jax.Array, data: Data, size: int | None = None, weight: PyTree = None
) -> Cohort:
    """A cohort drawn uniformly without replacement, on the device.

    Args:
      key: random key.
      data: the population's, `[N, ...]`.
      size: K; None for everyone.
      weight: float32 `[N]`, of each client's message; its number of examples by
        default, or 1 where data is no `ClientData`.

    Returns:
      A cohort in which all are alive.

    Raises:
      ValueError: if size is not between 1 and N, or weight does not have length N.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(jnp.zeros(9), jnp.zeros(9), [0, 0, 1, 2, 2, 2, 3, 3, 3])
    >>> cohort = sample_cohort(jax.random.key(0), data, size=2)
    >>> sizes = jnp.array([2, 1, 3, 3])
    >>> bool((cohort.weight == sizes[cohort.client]).all())
    True
    """
    n = population_size(data)
    if size is not None and not 1 <= size <= n:
        raise ValueError(f"cohort_size must be between 1 and {n}, got {size}.")
    if weight is None:
        weight = data.size if isinstance(data, ClientData) else jnp.ones(n)
    if jnp.shape(weight) != (n,):
        raise ValueError(f"weight must have shape ({n},), got {jnp.shape(weight)}.")
    weight = jnp.asarray(weight, jnp.float32)
    client = jnp.arange(n, dtype=jnp.int32)
    if size is None or size == n:
        return Cohort(client, data, weight, jnp.ones(n, bool))
    client = jax.random.choice(key, client, (size,), replace=False)
    return Cohort(
        client, select_clients(data, client), weight[client], jnp.ones(size, bool)
    )


def scan_rounds(
    federation: Federation,
    state: State,
    data: Data,
    *,
    rounds: int,
    key: jax.Array,
    cohort_size: int | None = None,
    weight: jax.Array | None = None,
    evaluate: Evaluate | None = None,
    every: int = 1,
) -> tuple[State, tuple[Info, dict]]:
    """A run as a pure function: vmap it over seeds, differentiate it, jit it.

    `simulate` is this, in segments, with progress, checkpoints and a history. The
    randomness of a round depends on `key` and `state.round` only, so that runs of 3
    and then 2 rounds are a run of 5.

    Args:
      federation: the composed round.
      state: where to start.
      data: the population's.
      rounds: R.
      key: of the run.
      cohort_size: K, clients drawn uniformly for each round; None for everyone.
      weight: float32 `[N]`, see `sample_cohort`.
      evaluate: `state -> {name: array}`, or None.
      every: rounds between evaluations; must divide `rounds`.

    Returns:
      The last state, and `(info [R, K, ...], evaluations [R / every, ...])`.

    Raises:
      ValueError: if every does not divide rounds, or either is not positive.

    Four runs with four client learning rates, as one program:

    >>> import optax
    >>> from jaxfl import fedavg, federate, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0])
    >>> data = from_arrays(y, y, client_ids=[0, 1])
    >>> def final_model(learning_rate):
    ...     federation = federate(fedavg(loss, optax.sgd(learning_rate)), mean())
    ...     state = federation.init(jnp.float32(0.0), data)
    ...     return scan_rounds(
    ...         federation, state, data, rounds=1, key=jax.random.key(0))[0].params
    >>> rates = jnp.array([0.0, 0.125, 0.25, 0.5])
    >>> jax.vmap(final_model)(rates).tolist()
    [0.0, 0.5, 1.0, 2.0]
    >>> jax.grad(final_model)(0.25).item()
    4.0
    """
    if every < 1 or rounds < 1 or rounds % every:
        raise ValueError(f"every must divide rounds, got {every=} and {rounds=}.")
    sample_key, run_key = jax.random.split(key)

    def one_round(state, _):
        cohort = sample_cohort(
            jax.random.fold_in(sample_key, state.round), data, cohort_size, weight
        )
        return federation.round(run_key, state, cohort)

    def segment(state, _):
        state, info = jax.lax.scan(one_round, state, length=every)
        return state, (info, {} if evaluate is None else evaluate(state))

    state, (info, evaluations) = jax.lax.scan(segment, state, length=rounds // every)
    info = jax.tree.map(lambda x: x.reshape(rounds, *x.shape[2:]), info)
    return state, (info, evaluations)


@functools.partial(
    jax.jit,
    static_argnames=("federation", "rounds", "cohort_size"),
    donate_argnames="state",
)
def _segment(federation, state, data, weight, evaluate, key, *, rounds, cohort_size):
    """The compiled unit of `simulate`: some rounds, then an evaluation."""
    state, (info, evaluations) = scan_rounds(
        federation,
        state,
        data,
        rounds=rounds,
        key=key,
        cohort_size=cohort_size,
        weight=weight,
        evaluate=evaluate,
        every=rounds,
    )
    out = state, History(info, evaluations, state.round[None])
    if federation.mesh is None:
        return out
    # Every process reads all of it, and the next call finds what this one found.
    everywhere = NamedSharding(federation.mesh, P())
    return jax.lax.with_sharding_constraint(out, everywhere)


def simulate(
    federation: Federation,
    params: Params,
    data: Data,
    *,
    rounds: int,
    key: jax.Array,
    cohort_size: int | None = None,
    weight: jax.Array | np.ndarray | None = None,
    evaluate: Evaluate | None = None,
    every: int = 1,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    until: Callable[[dict[str, np.ndarray]], bool] | None = None,
    progress: bool = True,
) -> tuple[State, History]:
    """Runs a federation.

    Rounds run on the device in compiled segments of `every` rounds; while one runs the
    host reads the one before, so that neither progress nor history slows the run.
    The run is a function of its arguments: the same key gives the same run.

    The first Ctrl-C or SIGTERM, which is how schedulers preempt, ends it after the
    segments in flight, at most two, and what was done is saved and returned, with a
    warning that names the signal; a second one acts as it would have. Signals are left
    alone where the run is not in the main thread.

    A job that is started again need not compile again: JAX keeps compiled programs in
    the folder that `jax.config.update("jax_compilation_cache_dir", ...)` names.

    Args:
      federation: the composed round, see `federate`.
      params: the initial model.
      data: the population: a `ClientData`, or a pytree of `[N, ...]` arrays.
      rounds: how many rounds in all, those before a checkpoint included.
      key: random key, `jax.random.key(seed)`.
      cohort_size: K, clients drawn uniformly without replacement for each round; None
        for everyone.
      weight: `[N]`, the weights of clients; their numbers of examples by default.
      evaluate: `state -> {name: array}` after every segment, on the device; see
        `evaluate.on_server`.
      every: rounds in a segment.
      checkpoint: a folder. If it holds a run, this one goes on where that stopped, to
        the same bits. It must have been begun with the same arguments: the key, the
        initial params, the weights, N, K, `every` and a sample of the data are checked,
        the federation is taken on trust. `rounds` may grow.
      checkpoint_every: rounds between checkpoints, a multiple of `every`; about twenty
        checkpoints a run by default. The last round is always saved. They are written
        while the next segment runs.
      until: `{name: value} -> bool`, stops the run after the first evaluation for which
        it holds.
      progress: whether to show a progress bar.

    Returns:
      The last state, with the model in `state.params`, and the `History`.

    Raises:
      TypeError: if key is not a random key, or a part of the round is at fault.
      ValueError: if a number is out of range, or checkpoint holds another run.

    >>> import optax
    >>> from jaxfl import fedavg, federate, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.arange(4.0)
    >>> state, history = simulate(
    ...     federate(fedavg(loss, optax.sgd(0.5)), mean()),
    ...     jnp.float32(0.0),
    ...     from_arrays(y, y, client_ids=[0, 1, 2, 3]),
    ...     rounds=4, every=2, key=jax.random.key(0), progress=False,
    ...     evaluate=lambda state: {"distance": abs(state.params - 1.5)})
    >>> history.round.tolist(), history["distance"].tolist()
    ([2, 4], [0.375, 0.09375])
    >>> history.clients.metrics["loss"].shape  # every round, every client
    (4, 4)
    """
    n = population_size(data)
    if until is not None and evaluate is None:
        raise ValueError("until needs evaluate: it judges what evaluate returned.")
    _check_arguments(n, rounds, key, cohort_size, weight, every, checkpoint_every)
    if evaluate is not None and not isinstance(evaluate, jax.tree_util.Partial):
        evaluate = jax.tree_util.Partial(evaluate)
    given = data
    params, data, weight, key, evaluate = _place(
        (params, data, weight, key, evaluate), federation
    )
    # A copy, as the state is donated and must not share buffers with `params`.
    state = jax.tree.map(jnp.copy, jax.jit(federation.init)(params, data))
    state = _place(state, federation)

    def segment(state, rounds):
        return _segment(
            federation,
            state,
            data,
            weight,
            evaluate,
            key,
            rounds=rounds,
            cohort_size=None if cohort_size == n else cohort_size,
        )

    with contextlib.ExitStack() as stack:
        pieces, unread, folder, copied = [], [], None, None
        if checkpoint is not None:
            from jaxfl.checkpoint import Checkpoints, digest

            run = {
                "key": jax.random.key_data(key).tolist(),
                "params": digest(params),
                "weight": digest(weight),
                "data": digest(given, most=2**20),
                "population": n,
                "cohort_size": cohort_size,
                "every": every,
            }
            folder = stack.enter_context(
                contextlib.closing(Checkpoints(checkpoint, run))
            )
            piece = jax.eval_shape(lambda s: segment(s, 1)[1], state)
            state, pieces = folder.restore(state, piece)
        checkpoint_every = checkpoint_every or every * max(1, rounds // every // 20)
        done = int(state.round)
        if done > rounds:
            raise ValueError(f"rounds: {checkpoint} holds {done}, more than {rounds}.")
        reached = _holds(until, pieces)
        interrupted = stack.enter_context(_interruptible())
        show = stack.enter_context(_progress_bar(progress, rounds, done))

        def read():
            while unread:
                # A copy: what device_get gives may keep a buffer of the device alive.
                piece = jax.tree.map(np.array, jax.device_get(unread.pop(0)))
                pieces.append(piece)
                show(piece)

        while done < rounds and not (reached or interrupted()):
            length = min(every - done % every, rounds - done)
            state, piece = segment(state, length)
            done += length
            # While it runs, what the segment before has left is read and saved.
            read()
            if folder and copied:
                folder.save(copied, pieces)
            save = folder is not None and done % checkpoint_every == 0
            copied = Checkpoints.copy(state) if save else None
            unread.append(piece)
            if until:
                read()
            reached = _holds(until, pieces)
        read()
        if folder:
            folder.save(Checkpoints.copy(state), pieces)
    if not pieces:
        raise KeyboardInterrupt(interrupted())
    if by := interrupted():
        message = f"interrupted after {done} of {rounds} rounds by {by}"
        warnings.warn(message, stacklevel=2)
    return state, concatenate(pieces)


def _holds(until: Callable | None, pieces: list[History]) -> bool:
    """Whether the last evaluation that was read ends the run."""
    if until is None or not pieces:
        return False
    newest = {name: values[-1] for name, values in pieces[-1].evaluations.items()}
    return bool(until(newest))


def _check_arguments(n, rounds, key, cohort_size, weight, every, checkpoint_every):
    if not (
        isinstance(key, jax.Array)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.ndim == 0
    ):
        raise TypeError(f"key must be one key, jax.random.key(seed), got {key!r}.")
    for name, value in (("rounds", rounds), ("every", every)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if cohort_size is not None and not 1 <= cohort_size <= n:
        raise ValueError(f"cohort_size must be between 1 and {n}, got {cohort_size}.")
    if weight is not None:
        if np.shape(weight) != (n,):
            raise ValueError(f"weight must have shape ({n},), got {np.shape(weight)}.")
        if not (np.isfinite(weight).all() and (np.asarray(weight) >= 0).all()):
            raise ValueError("weight must be finite and not negative.")
    if checkpoint_every is not None and (
        checkpoint_every < 1 or checkpoint_every % every
    ):
        raise ValueError(
            f"checkpoint_every must be a multiple of {every=}, got {checkpoint_every}."
        )


def _place(tree: PyTree, federation: Federation) -> PyTree:
    """The tree on the device, or on every device of the federation's mesh."""
    if federation.mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    everywhere = NamedSharding(federation.mesh, P())

    def put(x):
        if not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return jax.device_put(x, everywhere)
        # device_put refuses keys where the mesh spans several processes.
        words = jax.device_put(jax.random.key_data(x), everywhere)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))

    return jax.tree.map(put, tree)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], str]]:
    """Keeps the name of the first Ctrl-C or SIGTERM, and puts off what it would do.

    A donated state must not be lost half-way.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def first(number, frame):
        received.append(signal.Signals(number).name)
        restore()

    # A handler of None was not installed by Python, which cannot put it back.
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    previous = {n: handler for n, handler in handlers.items() if handler is not None}
    for number in previous:
        signal.signal(number, first)
    try:
        yield lambda: "".join(received)
    finally:
        restore()


@contextlib.contextmanager
def _progress_bar(visible: bool, rounds: int, done: int) -> Iterator[Callable]:
    """A bar with rounds, rounds per second, time left, and the newest metrics."""
    if not visible or jax.process_index() > 0:
        yield lambda piece: None
        return
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("round"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[metrics]}"),
    )
    with bar:
        task = bar.add_task("", total=rounds, completed=done, rate="", metrics="")

        def show(piece: History):
            newest = {
                name: values[-1]
                for name, values in piece.evaluations.items()
                if np.ndim(values) == 1
            }
            bar.advance(task, len(piece.clients.client))
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(
                task,
                rate=f"{speed:.3g} rounds/s" if speed else "",
                metrics="  ".join(f"{k} {v:.4f}" for k, v in newest.items()),
            )

        yield show
