"""Models of a linen, nnx or plain module, and what is done before and after it.

An adapter makes a `Model`, four plain functions, of a network that maps inputs to
outputs. jaxfl itself needs only `model.loss`; any function of that signature will do.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxfl import local

Params = Any
Batch = Any  # {"x": [B, ...], "y": [B, ...]}
Losses = Callable[[jax.Array, jax.Array], jax.Array]
Measures = Callable[[jax.Array, jax.Array], dict[str, jax.Array]]


class Model(NamedTuple):
    """A model as four pure functions of its parameters.

    Attributes:
      init: `key -> params`, a pytree of arrays; a `local.Normalised` of a module with
        batch normalisation.
      apply: `(params, x, key=None) -> outputs [B, ...]`; with a key the model is in
        training (dropout is drawn from the key), without one in evaluation.
      loss: `(params, batch, key) -> float32 [B]`, the training loss of each example.
        Not their mean: the last batch of a client is padded, and the mean is taken over
        the examples that are real. With batch normalisation, where an example has no
        loss by itself, a `local.Differentiated`.
      metrics: `(params, batch) -> {"loss": [B], "accuracy": [B]}` in evaluation, for
        each example.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    loss: Any  # a local.Loss, which most models can be called for
    metrics: Callable[[Params, Batch], dict[str, jax.Array]]


# ------------------------------------------------- what is done before and after it


def scale(x: jax.Array) -> jax.Array:
    """Bytes to float32 in [0, 1]; anything else is left as it is.

    Args:
      x: inputs, of any shape.

    Returns:
      `x / 255` if `x` is uint8, else `x`.

    Example:
      >>> scale(jnp.array([0, 255], jnp.uint8))
      Array([0., 1.], dtype=float32)
    """
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def standardize(mean: Any, std: Any) -> Callable[[jax.Array], jax.Array]:
    """Inputs to mean 0 and deviation 1: `x -> (scale(x) - mean) / std`.

    Args:
      mean: of the scaled inputs; a number or an array that broadcasts, such as `[C]`.
      std: their standard deviation, likewise.

    Returns:
      A function for the argument `preprocess` of the adapters.

    Example:
      >>> standardize(0.5, 0.25)(jnp.array([0, 255], jnp.uint8))
      Array([-2.,  2.], dtype=float32)
    """
    return lambda x: (scale(x) - mean) / std


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy of each example, in nats.

    `f_b = log sum_c exp(z_bc) - z_b,y_b`, and its mean over any further axes (the
    tokens of a sequence). NaN for a label that is no class, so that it is not passed
    over in silence: the client's update is rejected.

    Args:
      logits: `[B, ..., C]`.
      labels: class numbers, `[B, ...]`.

    Returns:
      `float32 [B]`.

    Example:
      >>> cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
      Array([1.3862944, 1.3862944], dtype=float32)
    """
    # By one-hot labels: the gradient of a lookup is a scatter, slow in small steps.
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    known = (labels >= 0) & (labels < logits.shape[-1])
    return _per_example(jnp.where(known, losses, jnp.nan))


def accuracy(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Whether the greatest logit is that of the label.

    Args:
      logits: `[B, ..., C]`.
      labels: class numbers, `[B, ...]`.

    Returns:
      `{"accuracy": float32 [B]}`, the mean over any further axes.

    Example:
      >>> accuracy(jnp.eye(2), jnp.array([0, 0]))
      {'accuracy': Array([1., 0.], dtype=float32)}
    """
    return {"accuracy": _per_example(jnp.argmax(logits, -1) == labels)}


def _per_example(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=range(1, x.ndim), dtype=jnp.float32)


# ---------------------------------------------------------------------- the adapters


def from_function(
    init: Callable[[jax.Array], Params],
    apply: Callable[[Params, jax.Array, jax.Array | None], jax.Array],
    *,
    loss: Losses = cross_entropy,
    metrics: Measures = accuracy,
    preprocess: Callable[[jax.Array], jax.Array] = scale,
    dtype: Any = None,
) -> Model:
    """A `Model` of two plain functions.

    Args:
      init: `key -> params`.
      apply: `(params, x, key) -> outputs`; the key is None in evaluation.
      loss: `(outputs, y) -> [B]`, one loss for each example.
      metrics: `(outputs, y) -> {name: [B]}`, to be reported beside the loss.
      preprocess: `x -> x`, before anything else.
      dtype: what `apply` computes in, `jnp.bfloat16` for instance: it is given the
        parameters and inputs in it, and its outputs are made float32. The parameters
        themselves, their gradients and all optimisers stay as they are. None leaves
        everything to `apply`.

    Returns:
      The model; make it once, as a function made anew is compiled anew.

    Raises:
      TypeError: `apply` does not take three arguments.

    Example:
      >>> model = from_function(
      ...     init=lambda key: {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)},
      ...     apply=lambda params, x, key: x @ params["w"] + params["b"],
      ... )
      >>> batch = {"x": jnp.ones((2, 4)), "y": jnp.array([0, 1])}
      >>> model.metrics(model.init(jax.random.key(0)), batch)["accuracy"]
      Array([1., 0.], dtype=float32)
    """
    try:
        inspect.signature(apply).bind(None, None, None)
    except TypeError as error:
        raise TypeError(
            "apply must take (params, x, key), where a model without randomness "
            f"ignores the key; got {inspect.signature(apply)}."
        ) from error

    def outputs(params, x, key=None):
        x = preprocess(x)
        if dtype is None:
            return apply(params, x, key)
        params, x = _floats_to(dtype, (params, x))
        return apply(params, x, key).astype(jnp.float32)

    def losses(params, batch, key):
        return loss(outputs(params, batch["x"], key), batch["y"]).astype(jnp.float32)

    def measures(params, batch):
        out, y = outputs(params, batch["x"]), batch["y"]
        return {"loss": loss(out, y).astype(jnp.float32), **metrics(out, y)}

    return Model(init, outputs, losses, measures)


def _floats_to(dtype: Any, tree: Any) -> Any:
    """The tree with its floating-point leaves in a dtype, and others as they were."""

    def leaf(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def from_linen(
    module: nn.Module,
    example_x: Any,
    *,
    loss: Losses = cross_entropy,
    metrics: Measures = accuracy,
    preprocess: Callable[[jax.Array], jax.Array] = scale,
    dtype: Any = None,
) -> Model:
    """A `Model` of a Flax linen module.

    A module that behaves differently in training takes a keyword `train` (or
    `training`, or its opposite `deterministic`) in `__call__`, as usual in linen: it is
    set by the adapter. Every stream of random numbers (`dropout`, ...) comes from the
    key of the call.

    A module with batch normalisation also takes a keyword `mask`, bool `[B]`, of the
    rows that are examples, so that those that fill up a batch stay out of its
    statistics: `nn.BatchNorm(not train)(x, mask=mask[:, None])` for `x [B, C]`. Its
    running averages are used in evaluation, and move in training; what the server
    makes of them is said at `fedavg` (the clients' mean) and `fedper` (FedBN).

    Args:
      module: `x -> outputs`, with parameters, batch statistics and no other variables.
      example_x: an input, `[B, ...]`, of which only shape and dtype matter.
      loss: as in `from_function`.
      metrics: as in `from_function`.
      preprocess: as in `from_function`.
      dtype: as in `from_function`.

    Returns:
      The model, whose params are the module's `"params"` collection; with batch
      normalisation, a `local.Normalised` of that and `"batch_stats"`.

    Raises:
      TypeError: `module` is not an instance of a linen module.
      ValueError: the module has other variables, or batch statistics and no `mask`.

    Example:
      >>> from jaxfl.models import two_nn
      >>> model = from_linen(two_nn(), jnp.zeros((1, 28, 28, 1), jnp.uint8))
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.zeros((5, 28, 28, 1), jnp.uint8)).shape
      (5, 10)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an instance of flax.linen.Module, got {module!r}."
        )
    mode, mask = _mode_argument(type(module)), _mask_argument(type(module))
    needs_mask = mask is not None and mask.default is mask.empty

    def variables(key):
        x = preprocess(jnp.zeros(example_x.shape, example_x.dtype))
        # Where it may be left out it may mean something else, such as attention's.
        mask = jnp.ones(len(x), bool) if needs_mask else None
        return module.init(key, x, **mode(False, mask))

    names = set(jax.eval_shape(variables, jax.random.key(0)))
    _refuse_state(names - {"params", "batch_stats"})

    def init(key):
        made = variables(key)
        return made["params"], made.get("batch_stats", {})

    def apply(params, statistics, x, key, mask) -> Any:
        # linen falls back on the key of "params" for every stream it is not given.
        rngs = None if key is None else {"params": key}
        outputs, changed = module.apply(
            {"params": params, "batch_stats": statistics},
            x,
            rngs=rngs,
            mutable=[] if key is None else ["batch_stats"],
            **mode(key is not None, mask),
        )
        return outputs, changed.get("batch_stats", statistics)

    own = "batch_stats" in names
    if own:
        _require_mask(type(module))
    return _adapted(
        *(init, apply, own),
        loss=loss,
        metrics=metrics,
        preprocess=preprocess,
        dtype=dtype,
    )


def from_nnx(
    make_module: Callable[..., Any],
    *,
    loss: Losses = cross_entropy,
    metrics: Measures = accuracy,
    preprocess: Callable[[jax.Array], jax.Array] = scale,
    dtype: Any = None,
) -> Model:
    """A `Model` of a Flax nnx module.

    Training and evaluation are `module.train()` and `module.eval()`; a keyword `train`,
    `training` or `deterministic` of `__call__` is set too. Every stream of random
    numbers comes from the key of the call. A module with batch normalisation takes a
    keyword `mask`, see `from_linen`: `self.norm(x, mask=mask[:, None])`.

    Args:
      make_module: `rngs=nnx.Rngs -> module`, called by keyword: a module's class, or
        `functools.partial(Net, 784, 10)`. Not a module, which has been initialised.
      loss: as in `from_function`.
      metrics: as in `from_function`.
      preprocess: as in `from_function`.
      dtype: as in `from_function`.

    Returns:
      The model, whose params are nested dicts of arrays: the module's `nnx.Param`; with
      batch normalisation, a `local.Normalised` of that and its `nnx.BatchStat`.

    Raises:
      TypeError: `make_module` is a module, or makes none.
      ValueError: the module has other variables, or batch statistics and no `mask`.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> model = from_nnx(functools.partial(nnx.Linear, 4, 3))
      >>> jax.tree.map(jnp.shape, model.init(jax.random.key(0)))
      {'bias': (3,), 'kernel': (4, 3)}
    """
    from flax import nnx  # a fifth of the time to import jax, flax and optax

    if isinstance(make_module, nnx.Module):
        raise TypeError(
            "make_module must make a module, so that init(key) can draw its "
            "parameters; got a module. Pass its class, or functools.partial(Net, ...)."
        )

    def split(key):
        module = make_module(rngs=nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise TypeError(f"make_module must make a flax.nnx.Module, got {module!r}.")
        parts = nnx.split(module, nnx.Param, nnx.BatchStat, nnx.RngState, ...)
        return type(module), parts

    # Only shapes: nothing is computed, nothing of the trace is kept but the structure.
    static = []

    def structure(key):
        kind, (graph, _, statistics, rng, rest) = split(key)
        static[:] = kind, graph
        return [nnx.to_pure_dict(part) for part in (statistics, rng, rest)]

    statistics, rng, rest = jax.eval_shape(structure, jax.random.key(0))
    kind, graph = static
    mode, own = _mode_argument(kind), bool(jax.tree.leaves(statistics))
    _refuse_state(jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(rest))
    if own:
        _require_mask(kind)

    def init(key):
        _, params, statistics, *_ = split(key)[1]
        return nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)

    def apply(params, statistics, x, key, mask):
        keys = jax.random.key(0) if key is None else key
        leaves, treedef = jax.tree.flatten(rng)
        fresh = [
            jax.random.split(jax.random.fold_in(keys, i), leaf.shape)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        module = nnx.merge(
            graph, params, statistics, jax.tree.unflatten(treedef, fresh)
        )
        module.eval() if key is None else module.train()
        outputs = module(x, **mode(key is not None, mask))
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return _adapted(
        *(init, apply, own),
        loss=loss,
        metrics=metrics,
        preprocess=preprocess,
        dtype=dtype,
    )


def _adapted(init, apply, own: bool, *, loss, metrics, preprocess, dtype) -> Model:
    """A `Model` of `key -> (params, statistics)` and `(params, statistics, x, key,
    mask) -> (outputs, statistics)`; `own` is whether there are statistics."""
    options = {"loss": loss, "metrics": metrics, "preprocess": preprocess}
    if not own:
        return from_function(
            lambda key: init(key)[0],
            lambda params, x, key: apply(params, {}, x, key, None)[0],
            dtype=dtype,
            **options,
        )

    def outputs(params, statistics, x, key, mask):
        if dtype is None:
            return apply(params, statistics, x, key, mask)
        params, x = _floats_to(dtype, (params, x))  # statistics stay as precise as ever
        out, statistics = apply(params, statistics, x, key, mask)
        return out.astype(jnp.float32), statistics

    def everywhere(x):
        return jnp.ones(len(x), bool)

    model = from_function(
        lambda key: local.Normalised(*init(key)),
        lambda both, x, key: outputs(
            both.params, both.statistics, x, key, everywhere(x)
        )[0],
        **options,
    )

    def losses(params, statistics, batch, mask, key):
        x = preprocess(batch["x"])
        out, statistics = outputs(params, statistics, x, key, mask)
        return loss(out, batch["y"]).astype(jnp.float32), statistics

    return model._replace(loss=local.normalised(losses))


def _mode_argument(module: type) -> Callable[..., dict[str, Any]]:
    """How to tell a module's `__call__` that it is in training, and what is real."""
    names = inspect.signature(module.__call__).parameters  # pyright: ignore

    def mode(train, mask=None):
        flags = {"train": train, "training": train, "deterministic": not train}
        if mask is not None:
            flags["mask"] = mask
        return {name: flag for name, flag in flags.items() if name in names}

    return mode


def _refuse_state(names) -> None:
    if names := sorted(names):
        raise ValueError(
            "module must have no variables but parameters and batch statistics, got "
            f"{', '.join(names)}."
        )


def _mask_argument(module: type) -> inspect.Parameter | None:
    names = inspect.signature(module.__call__).parameters  # pyright: ignore
    return names.get("mask")


def _require_mask(module: type) -> None:
    if _mask_argument(module) is None:
        raise ValueError(
            f"module has batch statistics, so {module.__name__}.__call__ must take a "
            "keyword mask, bool [B], for its BatchNorm, or what fills up a client's "
            "last batch would enter them; see from_linen. Or use GroupNorm."
        )
