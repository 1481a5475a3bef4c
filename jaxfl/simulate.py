"""Whole runs: rounds as scans on the device, and the host's part between them."""

import contextlib
import dataclasses
import functools
import numbers
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfl.core import Cohort, Data, Federation, Info, Params, State
from jaxfl.faults.schedule import Schedule
from jaxfl.history import History, concatenate
from jaxfl.mesh import AXIS, NOBODY, are_spread
from jaxfl.round import population_size
from jaxfl.sampling import (
    Cyclic,
    Poisson,
    cohort_of,
    cohort_rows,
    draws_of_run,
    sample_cohort,
    without_padding,
)
from jaxfl.stream import (
    HostStates,
    OnHost,
    gather,
    placeholder,
    population_of,
    prefetch,
)

PyTree = Any
Evaluate = Callable[[State], dict[str, jax.Array]]


def scan_rounds(
    federation: Federation,
    state: State,
    data: Data,
    *,
    rounds: int,
    key: jax.Array,
    cohort_size: int | Poisson | Cyclic | Schedule | None = None,
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
      cohort_size: K, clients drawn uniformly for each round; or `Poisson(...)`, or
        `Cyclic(K)`; or a `faults.Schedule`, of which round t is done in round t of the
        run, and which a vmap may map over; None for everyone.
      weight: float32 `[N]`, see `sample_cohort`.
      evaluate: `state -> {name: array}`, or None.
      every: rounds between evaluations; must divide `rounds`.

    Returns:
      The last state, and `(info [R, K, ...], evaluations [R / every, ...])`.

    Raises:
      ValueError: if every does not divide rounds, or either is not positive; if a
        schedule does not fit, or has too few rounds.

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

    n = population_size(data)
    cohort_rows(cohort_size, n)
    if isinstance(cohort_size, Schedule):
        done = 0 if isinstance(state.round, Tracer) else int(state.round)
        _check_long_enough(cohort_size, done + rounds)
    cohort_in = _cohorts(sample_key, data, weight, cohort_size, n)

    def one_round(state, _):
        return federation.round(run_key, state, cohort_in(state.round))

    def segment(state, _):
        state, info = jax.lax.scan(one_round, state, length=every)
        return state, (info, {} if evaluate is None else evaluate(state))

    state, (info, evaluations) = jax.lax.scan(segment, state, length=rounds // every)
    info = jax.tree.map(lambda x: x.reshape(rounds, *x.shape[2:]), info)
    return state, (info, evaluations)


def _cohorts(sample_key, data, weight, cohort_size, n) -> Callable:
    """`round -> Cohort`."""
    if isinstance(cohort_size, Schedule):
        schedule = jax.tree.map(jnp.asarray, cohort_size)

        def scheduled(round):
            now = schedule.at(round)
            return now.applied(cohort_of(now.client, data, weight))

        return scheduled
    if cohort_size is None or cohort_size == n:
        # everyone, whose data stay where they are
        return lambda round: sample_cohort(sample_key, data, weight=weight)
    draw = draws_of_run(sample_key, n, cohort_size)
    return lambda round: cohort_of(draw(round), data, weight)


@functools.partial(
    jax.jit,
    static_argnames=("federation", "rounds", "cohort_size", "layout"),
    donate_argnames="state",
)
def _segment(
    federation,
    state,
    data,
    weight,
    evaluate,
    key,
    schedule,
    *,
    rounds,
    cohort_size,
    layout,
):
    """The compiled unit of `simulate`: some rounds, then an evaluation.

    A schedule, which is data, comes in place of a cohort size, which is static.
    `layout` has the shardings of the state's leaves, or is None without a mesh.
    """
    state, (info, evaluations) = scan_rounds(
        federation,
        state,
        data,
        rounds=rounds,
        key=key,
        cohort_size=cohort_size if schedule is None else schedule,
        weight=weight,
        evaluate=evaluate,
        every=rounds,
    )
    return _laid_out(federation, state, info, evaluations, layout)


@functools.partial(
    jax.jit, static_argnames=("federation", "layout"), donate_argnames="state"
)
def _streamed_segment(federation, state, cohorts, evaluate, key, *, layout):
    """`_segment` over the cohorts `[R, K, ...]` that the host has drawn."""
    run_key = jax.random.split(key)[1]
    data = cohorts.data

    def one_round(state, cohort):
        start, size = cohort.data
        own = dataclasses.replace(data, start=start, size=size)
        return federation.round(run_key, state, cohort._replace(data=own))

    def segment(state, _):
        ranges = cohorts._replace(data=(data.start, data.size))
        state, info = jax.lax.scan(one_round, state, ranges)
        seen = state if cohorts.row is None else state._replace(clients=None)
        return state, (info, {} if evaluate is None else evaluate(seen))

    # Built as `scan_rounds` is, so that it is compiled to the same arithmetic.
    state, (info, evaluations) = jax.lax.scan(segment, state, length=1)
    info = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), info)
    return _laid_out(federation, state, info, evaluations, layout)


def _laid_out(federation, state, info, evaluations, layout):
    """What a segment gives, where the next call finds what this one found."""
    history = History(info, evaluations, state.round[None])
    if layout is None:
        return state, history
    layout = jax.tree.unflatten(jax.tree.structure(state), layout)
    # Every process reads all of the history.
    everywhere = NamedSharding(federation.mesh, P())
    return jax.lax.with_sharding_constraint(
        (state, history), (layout, jax.tree.map(lambda _: everywhere, history))
    )


def simulate(
    federation: Federation,
    params: Params,
    data: Data | OnHost,
    *,
    rounds: int,
    key: jax.Array,
    cohort_size: int | Poisson | Cyclic | Schedule | None = None,
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
    alone where the run is not in the main thread. Of several processes any may be the
    one that ends it, for all.

    A job that is started again need not compile again: JAX keeps compiled programs in
    the folder that `jax.config.update("jax_compilation_cache_dir", ...)` names.

    Args:
      federation: the composed round, see `federate`.
      params: the initial model. What already lies on the federation's mesh is split
        over it as it is; else, it is put on every device.
      data: the population: a `ClientData`, or a pytree of `[N, ...]` arrays, which are
        put on the device; or `on_host(...)`, of which the device sees cohorts only.
      rounds: how many rounds in all, those before a checkpoint included.
      key: random key, `jax.random.key(seed)`.
      cohort_size: K, clients drawn uniformly without replacement for each round; or
        `Poisson(expected)`, where each takes part for itself; or `Cyclic(K)`, in turn;
        or a `faults.Schedule`, which says who is there in each round, and what happens
        to them; None for everyone.
      weight: `[N]`, the weights of clients; their numbers of examples by default.
      evaluate: `state -> {name: array}` after every segment, on the device; see
        `evaluate.on_server`.
      every: rounds in a segment.
      checkpoint: a folder. If it holds a run, this one goes on where that stopped, to
        the same bits. It must have been begun with the same arguments: the key, the
        initial params, the weights, N, K or the whole schedule, `every` and a sample of
        the data are checked, the federation is taken on trust. `rounds` may grow, in a
        schedule that was long enough from the first.
      checkpoint_every: rounds between checkpoints, a multiple of `every`; about twenty
        checkpoints a run by default. The last round is always saved. They are written
        while the next segment runs.
      until: `{name: value} -> bool`, stops the run after the first evaluation for which
        it holds.
      progress: whether to show a progress bar.

    Returns:
      The last state, with the model in `state.params`, and the `History`. Over a mesh
      whose devices divide N `state.clients` is spread over them, and of several
      processes each has its own part: `multihost_utils.process_allgather` has it all.

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
    given = population_of(data)
    n = population_size(given)
    if until is not None and evaluate is None:
        raise ValueError("until needs evaluate: it judges what evaluate returned.")
    _check_arguments(n, rounds, key, cohort_size, weight, every, checkpoint_every)
    size = None if cohort_size == n else cohort_size
    if evaluate is not None and not isinstance(evaluate, jax.tree_util.Partial):
        evaluate = jax.tree_util.Partial(evaluate)
    sample_key = jax.random.split(key)[0]  # on this process's own device
    params, weight, key, evaluate = _place((params, weight, key, evaluate), federation)
    if isinstance(data, OnHost):
        state, feed, segment, piece_like = _from_host(
            federation, params, data, weight, evaluate, key, sample_key, size
        )
    else:
        state, feed, segment, piece_like = _from_device(
            federation, params, data, weight, evaluate, key, size
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
                "cohort_size": _written(cohort_size, digest),
                "every": every,
            }
            folder = stack.enter_context(
                contextlib.closing(Checkpoints(checkpoint, run))
            )
            state, pieces = folder.restore(state, piece_like())
        checkpoint_every = checkpoint_every or every * max(1, rounds // every // 20)
        done = int(state.round)
        if done > rounds:
            raise ValueError(f"rounds: {checkpoint} holds {done}, more than {rounds}.")
        interrupted = stack.enter_context(_interruptible())
        show = stack.enter_context(_progress_bar(progress, rounds, done))
        spans = _spans(done, rounds, every)
        fed = stack.enter_context(contextlib.closing(feed(spans)))
        agreed = _vote(federation.mesh)
        reached = _holds(until, pieces)
        stop = agreed(reached or bool(interrupted()), state)

        def read():
            while unread:
                # A copy: what device_get gives may keep a buffer of the device alive.
                piece = jax.tree.map(np.array, jax.device_get(unread.pop(0)))
                pieces.append(piece)
                show(piece)

        while done < rounds and not stop:
            state, piece = segment(state, next(fed))
            done += len(piece.clients.client)
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
            stop = agreed(reached or bool(interrupted()), piece)
        read()
        if folder:
            folder.save(copied or Checkpoints.copy(state), pieces)
    if not pieces:
        raise KeyboardInterrupt(interrupted())
    by = interrupted()
    if by or (done < rounds and not reached):
        by = by or "another process"
        message = f"interrupted after {done} of {rounds} rounds by {by}"
        warnings.warn(message, stacklevel=2)
    return state, concatenate(pieces)


def _written(cohort_size: Any, digest: Callable[[PyTree], str]) -> Any:
    """A cohort size as JSON can hold it."""
    if isinstance(cohort_size, Schedule):
        return f"Schedule({digest(cohort_size)})"
    return (
        repr(cohort_size) if isinstance(cohort_size, Poisson | Cyclic) else cohort_size
    )


def _spans(done: int, rounds: int, every: int) -> Generator[tuple[int, int]]:
    """The first round and the number of rounds of each segment to come."""
    while done < rounds:
        length = min(every - done % every, rounds - done)
        yield done, length
        done += length


def _from_device(federation, params, data, weight, evaluate, key, size):
    """What differs between runs: the first state; what each segment is fed, from the
    spans of all; a segment, `(state, fed) -> (state, piece)`; what a piece is like.
    """
    data = _place(data, federation)
    state, layout = _first_state(federation, params, data)
    schedule = None
    if isinstance(size, Schedule):
        schedule, size = _place(size, federation), None

    def segment(state, span):
        return _segment(
            federation,
            state,
            data,
            weight,
            evaluate,
            key,
            schedule,
            rounds=span[1],
            cohort_size=size,
            layout=layout,
        )

    def piece_like():
        return jax.eval_shape(lambda state: segment(state, (0, 1))[1], state)

    return state, lambda spans: spans, segment, piece_like


def _from_host(federation, params, host, weight, evaluate, key, sample_key, size):
    """The same for a population on the host, of which segments are fed cohorts."""
    data, n = host.data, host.data.num_clients
    weight = np.asarray(data.size if weight is None else weight, np.float32)
    sample_key = jax.device_put(sample_key, _host_device())
    seen, init = placeholder(data), jax.jit(federation.init)
    somebody = () if host.states is False else (np.zeros(1, np.int32),)
    state, layout = _first_state(federation, params, seen, *somebody)
    states = None
    if host.states is not False and jax.tree.leaves(state.clients):
        folder = None if host.states is True else host.states
        states = HostStates(lambda ids: init(params, seen, ids).clients, n, folder)
        state = state._replace(clients=states)

    def cohorts(span):
        first, rounds = span
        now = None
        if isinstance(size, Schedule):
            now = jax.tree.map(np.asarray, size).at(slice(first, first + rounds))
            client = now.client.astype(np.int32)
        elif size is None:
            client = np.tile(np.arange(n, dtype=np.int32), (rounds, 1))
        else:
            draws = _draws(sample_key, first, rounds=rounds, n=n, size=size)
            client = np.asarray(draws)
        somebody, alive = without_padding(client)
        once = row = None
        if states is not None:
            once, row = np.unique(somebody, return_inverse=True)
            row = row.reshape(client.shape).astype(np.int32)
            row = np.where(alive, row, np.int32(NOBODY))
        its_weight = np.where(alive, weight[somebody], np.float32(0))
        of_all: Any = client, gather(data, somebody), its_weight, alive, row
        cohort = Cohort(*of_all)
        cohort = cohort if now is None else now.applied(cohort)
        return _place_anywhere(cohort, federation), once

    def lend(state, cohorts, once):
        """The state with those clients' states of whom there are cohorts."""
        if states is None:
            return state
        room = min(cohorts.client.size, n)  # the same for every segment
        ids = np.pad(once, (0, room - len(once)), mode="edge")
        return state._replace(clients=_place(states[ids], federation))

    def run(state, cohorts):
        return _streamed_segment(
            federation, state, cohorts, evaluate, key, layout=layout
        )

    def segment(state, fed):
        cohorts, once = fed
        state, piece = run(lend(state, cohorts, once), cohorts)
        if states is not None:
            states[once] = jax.tree.map(lambda x: x[: len(once)], state.clients)
            state = state._replace(clients=states)
        return state, piece

    def piece_like():
        one, once = cohorts((0, 1))
        return jax.eval_shape(lambda state: run(state, one)[1], lend(state, one, once))

    return state, functools.partial(prefetch, cohorts), segment, piece_like


@functools.partial(jax.jit, static_argnames=("rounds", "n", "size"))
def _draws(key, first, *, rounds, n, size):
    """The ids of the cohorts of these rounds, as `scan_rounds` draws them."""
    return jax.lax.map(draws_of_run(key, n, size), first + jnp.arange(rounds))


def _host_device() -> Any:
    """A CPU, where draws do not wait for the rounds on an accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to have none
        return jax.local_devices()[0]


def _holds(until: Callable | None, pieces: list[History]) -> bool:
    """Whether the last evaluation that was read ends the run."""
    if until is None or not pieces:
        return False
    newest = {name: values[-1] for name, values in pieces[-1].evaluations.items()}
    return bool(until(newest))


def _vote(mesh: Mesh | None) -> Callable[[bool, PyTree], bool]:
    """`(flag, after) -> bool`: whether any of the processes of a mesh raised its flag.

    Several processes wait for `after`, the segment in flight: two programs that
    exchange data at a time may do so in another order on another process.
    """
    if mesh is None or len({d.process_index for d in mesh.devices.flat}) == 1:
        return lambda flag, after: flag

    def vote(flag, after):
        jax.block_until_ready(after)
        flags = jax.make_array_from_process_local_data(
            NamedSharding(mesh, P(mesh.axis_names)),
            np.full(len(mesh.local_devices), flag),
        )
        return bool(jnp.any(flags))

    return vote


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
    cohort_rows(cohort_size, n)
    if isinstance(cohort_size, Schedule):
        _check_long_enough(cohort_size, rounds)
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


def _check_long_enough(schedule: Schedule, rounds: int) -> None:
    if schedule.rounds < rounds:
        raise ValueError(
            f"schedule has {schedule.rounds} rounds, of the {rounds} there are to be."
        )


def _place(tree: PyTree, federation: Federation) -> PyTree:
    """The tree on the device, or on every device of the federation's mesh.

    What lies on this mesh already stays as it is.
    """
    if federation.mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    everywhere = NamedSharding(federation.mesh, P())

    def put(x):
        if getattr(getattr(x, "sharding", None), "mesh", None) == federation.mesh:
            return x
        if not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return jax.device_put(x, everywhere)
        # device_put refuses keys where the mesh spans several processes.
        words = jax.device_put(jax.random.key_data(x), everywhere)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))

    return jax.tree.map(put, tree)


def _first_state(federation, params, data, *clients):
    """The first state, and the shardings of its leaves; None without a mesh.

    The clients' states are spread over the clients' devices, if these divide N, and
    what has the name and shape of a parameter (a momentum, a client's own model) is
    split as that is. All else is on every device.
    """
    mesh, layout = federation.mesh, None
    if mesh is not None:
        shapes = jax.eval_shape(federation.init, params, data, *clients)
        over = AXIS if are_spread(shapes.clients, mesh) else None
        split = functools.partial(_split_as, params)

        def at_server(path, x):
            return NamedSharding(mesh, split(path, x.shape))

        def at_clients(path, x):
            return NamedSharding(mesh, P(over, *split(path, x.shape[1:])))

        layout = jax.tree_util.tree_map_with_path(at_server, shapes)._replace(
            clients=jax.tree_util.tree_map_with_path(at_clients, shapes.clients)
        )
    init = jax.jit(federation.init, out_shardings=layout)
    # A copy, as the state is donated and must not share buffers with `params`.
    state = jax.tree.map(jnp.copy, init(params, data, *clients))
    return state, layout and tuple(jax.tree.leaves(layout))


def _split_as(params: Params, path: tuple, shape: tuple[int, ...]) -> P:
    """How the parameter is split whose name ends a path and which has this shape."""
    named = dict(jax.tree_util.tree_leaves_with_path(params))
    for i in range(len(path) + 1):
        like = named.get(path[i:])
        if like is not None and like.shape == shape:
            return like.sharding.spec
    return P()


def _place_anywhere(tree: PyTree, federation: Federation) -> PyTree:
    """As `_place`, of NumPy arrays, in any thread: processes do not compare them."""
    if federation.mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    everywhere = NamedSharding(federation.mesh, P())
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__), tree
    )


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
