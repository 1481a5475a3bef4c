"""The client that reconstructs: what it does by hand, and to whom it does nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import attack, compress, mean, privacy, secure

ADVERSARY = 5
START = {"x": jnp.array([0.1, -0.2, 0.3]), "scale": jnp.float32(0.05)}


def plain(loss, rate=0.1):
    return jaxfl.fedavg(loss, optax.sgd(rate), batch_size=2)


def generate(generator, key):
    noise = jax.random.normal(key, (4, 3))
    return generator["x"] + generator["scale"] * noise


def attacked(algorithm=plain, generate=generate, optimizer=None, **options):
    options = {"adversary": ADVERSARY, "target": 2, "fake": 3} | options
    return attack.gan(
        *(algorithm(toy.loss), algorithm, toy.loss, generate, START),
        optax.sgd(0.1) if optimizer is None else optimizer,
        **options,
    )


def rounds(algorithm, channel=None, cohort=None, count=2):
    """The last state and info, one client after another."""
    channel = mean() if channel is None else channel
    federation = jaxfl.federate(algorithm, channel, chunk_size=1)
    state = federation.init(toy.params(), toy.data())
    cohort = toy.cohort(toy.data()) if cohort is None else cohort
    step = jax.jit(federation.round)
    for _ in range(count):
        state, info = step(jax.random.key(1), state, cohort)
    return state, info


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_who_only_listens_sends_what_it_would_have():
    state, info = rounds(attacked(weight=0.0))
    want, plainly = rounds(plain(toy.loss))
    assert_same(state.params, want.params)
    assert_same(info.bits_up, plainly.bits_up)
    assert_same(info.metrics["steps"], plainly.metrics["steps"])
    heard = state.clients.algorithm.generator["x"]
    assert abs(heard[ADVERSARY] - START["x"]).max() > 0.01


def test_without_the_adversary_nothing_is_attacked():
    alive = np.arange(toy.N) != ADVERSARY
    cohort = toy.cohort(toy.data(), range(toy.N), alive)
    state, _ = rounds(attacked(), cohort=cohort)
    want, _ = rounds(plain(toy.loss), cohort=cohort)
    assert_same(state.params, want.params)


def test_other_clients_send_what_they_would_have():
    channel = jaxfl.chain(jaxfl.tap("wire"), mean())
    state, info = rounds(attacked(), channel, count=1)
    _, want = rounds(plain(toy.loss), channel, count=1)
    honest = np.arange(toy.N) != ADVERSARY
    got, want = info.reports[0]["wire"]["w"], want.reports[0]["wire"]["w"]
    assert_same(got[honest], want[honest])
    assert abs(got[ADVERSARY] - want[ADVERSARY]).max() > 1e-3
    # Nor do they have a generator that learns, or measure one.
    own = state.clients.algorithm.generator["x"]
    assert_same(own[honest], np.broadcast_to(START["x"], (toy.N - 1, 3)))
    assert np.isnan(info.metrics["generator"][honest]).all()
    assert np.isfinite(info.metrics["generator"][ADVERSARY])


def test_a_round_by_hand():
    """Gradient steps on quadratics, with a generator of one point."""
    rate, weight, steps = 0.1, 0.7, 3

    def point(generator, key):
        return jnp.tile(generator["x"], (2, 1))

    def whole(loss):
        return jaxfl.fedavg(loss, optax.sgd(rate), batch_size=None)

    state, info = rounds(
        attacked(whole, point, weight=weight, steps=steps),
        jaxfl.chain(jaxfl.tap("wire"), mean()),
        count=1,
    )
    w, g = (np.asarray(x, np.float64) for x in (toy.params()["w"], START["x"]))
    b, losses = 0.25, []
    for _ in range(steps):  # of 1/2 |w - g|^2 + 1/2 (b - target)^2
        losses.append(0.5 * ((w - g) ** 2).sum() + 0.5 * (b - 2) ** 2)
        g = g - rate * (g - w)
    x, y, ids = toy.examples()
    x, y = x[ids == ADVERSARY].astype(np.float64), y[ids == ADVERSARY]
    of_w = (w - x.mean(0)) + weight * (w - g)
    of_b = (b - y.mean()) + weight * (b - 3)
    sent = jax.tree.map(lambda v: v[ADVERSARY], info.reports[0]["wire"])
    np.testing.assert_allclose(sent["w"], rate * of_w, rtol=1e-5)
    np.testing.assert_allclose(sent["b"], rate * of_b, rtol=1e-5)
    own = state.clients.algorithm.generator["x"][ADVERSARY]
    np.testing.assert_allclose(own, g, rtol=1e-5)
    value = info.metrics["generator"][ADVERSARY]
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)


def test_the_optimiser_goes_on_from_round_to_round():
    state, _ = rounds(attacked(optimizer=optax.adam(0.1), steps=3), count=4)
    counts = state.clients.algorithm.optimizer[0].count
    assert counts.tolist() == [12 * (i == ADVERSARY) for i in range(toy.N)]


def test_chunks_do_not_matter():
    one_by_one, _ = rounds(attacked())
    federation = jaxfl.federate(attacked(), mean(), chunk_size=3)
    state = federation.init(toy.params(), toy.data())
    for _ in range(2):
        state, _ = federation.round(jax.random.key(1), state, toy.cohort(toy.data()))
    for got, want in (
        (state.params, one_by_one.params),
        (state.clients.algorithm.generator, one_by_one.clients.algorithm.generator),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want
        )


CHANNELS = {
    "private": lambda: jaxfl.chain(
        jaxfl.clip(1.0), mean(denominator=toy.N), privacy.gaussian(0.1)
    ),
    "secure": lambda: jaxfl.chain(
        mean(denominator=toy.N),
        secure.fixed_point(8.0, 2**20),
        secure.secure_sum(lambda n: secure.Graph(4, 2)),
    ),
    "compressed": lambda: jaxfl.chain(compress.top_k(0.5), mean()),
}


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
def test_any_channel_will_do(channel):
    @jax.jit
    @jax.vmap
    def run(weight):
        federation = jaxfl.federate(attacked(weight=weight), channel(), chunk_size=1)
        state = federation.init(toy.params(), toy.data())
        cohort = toy.cohort(toy.data())
        return federation.round(jax.random.key(1), state, cohort)

    state, info = run(jnp.array([0.0, 1.0]))
    quiet, loud = state.params["w"]
    assert info.sent[:, ADVERSARY].all()
    assert jnp.isfinite(loud).all()
    assert abs(loud - quiet).max() > 1e-3


def test_others_may_do_what_the_adversary_does_not():
    """Records are private at the others, and nothing holds the adversary to it."""

    def private(loss):
        loss = privacy.dp_sgd(
            loss, clip_norm=1.0, noise_multiplier=0.3, denominator=2, microbatch_size=2
        )
        return plain(loss)

    channel = jaxfl.chain(jaxfl.tap("wire"), mean())
    rest = (toy.loss, generate, START, optax.sgd(0.1))
    who = {"adversary": ADVERSARY, "target": 2, "fake": 3}
    mixed = attack.gan(private(toy.loss), plain, *rest, **who)
    got, of_private, of_plain = (
        rounds(algorithm, channel, count=1)[1].reports[0]["wire"]["w"]
        for algorithm in (mixed, private(toy.loss), attacked())
    )
    honest = np.arange(toy.N) != ADVERSARY
    np.testing.assert_allclose(got[honest], of_private[honest], 1e-5, 1e-6)
    np.testing.assert_allclose(got[ADVERSARY], of_plain[ADVERSARY], 1e-5, 1e-6)


# ------------------------------------------------- a class that it has never held

CENTRES = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0]])  # of classes 0, 1 and 2


def blobs(classes):
    """Client 0 holds all of the classes but 1, which is the adversary's, client 1."""
    y = np.repeat(classes, 40)
    x = CENTRES[y] + 0.3 * np.random.default_rng(0).normal(size=(len(y), 2))
    ids = (y == 1).astype(int)
    assert 0 not in y[ids == 1]
    return jaxfl.from_arrays(jnp.float32(x), jnp.int32(y), ids)


def reconstruct(classes):
    """Where the samples of class 0 end, and the generator's loss, by seed."""

    def loss(params, batch, key):
        centres, offset = params
        distance = jnp.sum((batch["x"][:, None] - centres) ** 2, -1)
        logits = offset - 0.5 * distance
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def train(loss):
        return jaxfl.fedavg(loss, optax.sgd(0.1), batch_size=None)

    def run(seed):
        algorithm = attack.gan(
            *(train(loss), train, loss),
            lambda g, key: g["centre"] + 0.3 * jax.random.normal(key, (16, 2)),
            {"centre": jax.random.normal(jax.random.fold_in(seed, 1), (2,))},
            optax.sgd(0.05),
            adversary=1,
            target=0,
            fake=3,
            weight=0.3,
        )
        federation = jaxfl.federate(algorithm, mean(), chunk_size=1)
        params = 0.1 * jax.random.normal(seed, (4, 2)), jnp.zeros(4)
        state = federation.init(params, data)
        state, (info, _) = jaxfl.scan_rounds(
            federation, state, data, rounds=300, key=seed
        )
        generator = state.clients.algorithm.generator["centre"][1]
        return generator, info.metrics["generator"][:, 1]

    data = blobs(classes)
    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(3), 8))


def test_it_finds_the_class_that_only_the_other_has():
    generator, losses = reconstruct([0, 1, 2])
    near = np.linalg.norm(generator - CENTRES[0], axis=-1)
    assert np.median(near) < 1.0
    assert (losses[:, -20:].mean(1) < losses[:, :20].mean(1)).mean() > 0.7


def test_it_does_not_find_what_nobody_has():
    generator, _ = reconstruct([1, 2])
    assert np.median(np.linalg.norm(generator - CENTRES[0], axis=-1)) > 1.5


# ------------------------------------------------------------------ bad input, images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 1.5}, "steps must be a positive integer, got 1.5"),
        ({"weight": -1.0}, "weight must not be negative"),
        ({"fake": 2}, "fake must be another class than target"),
    ],
    ids=str,
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        attacked(**options)


def test_what_is_no_algorithm():
    train = plain
    rest = (toy.loss, generate, START, optax.sgd(0.1))
    who = {"adversary": 0, "target": 0, "fake": 1}
    with pytest.raises(TypeError, match="algorithm must be a jaxfl.Algorithm"):
        attack.gan(toy.loss, train, *rest, **who)  # pyright: ignore
    with pytest.raises(TypeError, match=r"lying\(loss\) must be a jaxfl.Algorithm"):
        attack.gan(train(toy.loss), lambda loss: loss, *rest, **who)  # pyright: ignore


def test_images_are_within_their_range_and_differ():
    net = attack.dcgan(4)
    z = jax.random.normal(jax.random.key(0), (8, 16))
    images, _ = net.init_with_output(jax.random.key(1), z)
    assert images.shape == (8, 28, 28, 1)
    assert 0 <= images.min() < images.max() <= 1
    assert (jnp.std(images, 0) > 1e-3).any()
