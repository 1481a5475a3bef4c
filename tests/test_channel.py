"""Channels: closed forms, one at a time and in chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfl
from jaxfl import Channel, Context, Message, chain, mean

PAYLOADS = [{"w": jnp.array([1.0, 2.0]), "n": jnp.array([4.0])} for _ in range(3)]
PAYLOADS[1] = {"w": jnp.array([-3.0, 0.5]), "n": jnp.array([1.0])}
PAYLOADS[2] = {"w": jnp.array([0.0, 8.0]), "n": jnp.array([-2.0])}
WEIGHTS = [1.0, 3.0, 4.0]


def context(client=-1, round=0):
    key = jax.random.fold_in(jax.random.key(round), client + 1)
    roster = jnp.arange(3)
    return Context(
        key,
        jax.random.key(9),
        jnp.int32(round),
        jnp.int32(client),
        roster,
        roster >= 0,
        jnp.int32(3),
    )


def deliver(channel, payloads=PAYLOADS, weights=WEIGHTS, rounds=1):
    """What the server gets of a round, by hand: (payload, messages, reports)."""
    server, own = channel.init(jax.tree.map(jnp.zeros_like, payloads[0]))
    owns = [own] * len(payloads)
    for r in range(rounds):
        messages, reports = [], []
        for i, (payload, weight) in enumerate(zip(payloads, weights, strict=True)):
            bits = 32.0 * sum(x.size for x in jax.tree.leaves(payload))
            message = Message(payload, jnp.float32(weight), jnp.float32(bits))
            message, owns[i], report = channel.encode(
                context(i, r), message, server, owns[i]
            )
            messages.append(message)
            reports.append(report)
        on = [m.weight > 0 for m in messages]
        sums = [
            jax.tree.map(lambda *x: sum(jnp.where(o, a, 0) for o, a in zip(on, x)), *xs)  # noqa: B023, B905, E501
            for xs in ([m.payload for m in messages], reports)
        ]
        payload, server = channel.decode(context(-1, r), sums[0], server, sums[1])
    return payload, messages, reports


def length(message):
    return message.bits.item() + np.float32(message.header).item()


def average(entry, weights):
    return np.average([p[entry] for p in PAYLOADS], axis=0, weights=weights)


# --- mean --------------------------------------------------------------------


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 1.0, 1.0], [0.0, 2.0, 0.5]])
def test_weighted_mean(weights):
    payload, messages, _ = deliver(mean(), weights=weights)
    for entry in ("w", "n"):
        np.testing.assert_allclose(payload[entry], average(entry, weights), rtol=1e-6)
    assert [length(m) for m in messages] == [96.0 + 32.0 * (w > 0) for w in weights]


def test_fixed_denominator_ignores_weights():
    payload, messages, _ = deliver(mean(denominator=10.0), weights=[5.0, 0.0, 1.0])
    np.testing.assert_allclose(payload["w"], np.array([1.0, 10.0]) / 10)
    assert {length(m) for m in messages} == {96.0}


def test_mean_of_nothing_is_zero():
    payload, _, _ = deliver(mean(), weights=[0.0, 0.0, 0.0])
    assert not any(x.any() for x in jax.tree.leaves(payload))


def test_mean_keeps_the_dtype():
    payloads = [{"w": jnp.array([1.5, 3.0], jnp.bfloat16)}] * 2
    payload, messages, _ = deliver(mean(), payloads, [1.0, 3.0])
    assert {payload["w"].dtype, messages[0].payload["w"].dtype} == {
        jnp.dtype("bfloat16")
    }
    assert payload["w"].tolist() == [1.5, 3.0]


@pytest.mark.parametrize("wrong", [0, -1.0])
def test_denominator_is_positive(wrong):
    with pytest.raises(ValueError, match=f"denominator .*{wrong}"):
        mean(wrong)


# --- gate, tap, on -----------------------------------------------------------


def large(threshold):
    return jaxfl.gate(
        lambda ctx, payload: optax.tree.norm(payload) > threshold, keep=False
    )


def test_gate_drops_what_is_not_worth_sending():
    payload, messages, reports = deliver(chain(large(5.0), mean()))
    assert [m.weight.item() for m in messages] == [0.0, 0.0, 4.0]
    assert [length(m) for m in messages] == [1.0, 1.0, 96.0 + 1.0 + 32.0]
    assert [r[0]["open"].item() for r in reports] == [False, False, True]
    np.testing.assert_allclose(payload["w"], PAYLOADS[2]["w"])


def test_a_gate_does_not_open_for_what_was_withheld_before():
    _, messages, _ = deliver(chain(large(5.0), large(0.0)))
    assert [m.weight.item() > 0 for m in messages] == [False, False, True]


def test_tap_sees_the_message_where_it_stands():
    double = jaxfl.at_client(optax.scale(2.0))
    payload, _, reports = deliver(
        chain(jaxfl.tap("before"), double, jaxfl.tap("after"), mean())
    )
    for report, sent in zip(reports, PAYLOADS, strict=True):
        np.testing.assert_array_equal(report[0]["before"]["w"], sent["w"])
        np.testing.assert_array_equal(report[2]["after"]["w"], 2 * sent["w"])
    np.testing.assert_allclose(payload["w"], 2 * average("w", WEIGHTS), rtol=1e-6)


def test_on_changes_one_entry():
    payload, messages, _ = deliver(
        chain(jaxfl.on("w", jaxfl.at_client(optax.scale(3.0))), mean())
    )
    np.testing.assert_allclose(payload["w"], 3 * average("w", WEIGHTS), rtol=1e-6)
    np.testing.assert_allclose(payload["n"], average("n", WEIGHTS), rtol=1e-6)
    assert length(messages[0]) == 128.0


def test_on_sends_zeros_for_an_entry_that_is_withheld():
    _, messages, _ = deliver(jaxfl.on("w", large(5.0)))
    assert [m.weight.item() for m in messages] == WEIGHTS
    assert [m.payload["w"].any().item() for m in messages] == [False, False, True]
    assert [length(m) for m in messages] == [33.0, 33.0, 97.0]


def test_on_needs_a_dictionary_with_that_entry():
    channel = jaxfl.on("w", mean())
    with pytest.raises(TypeError, match="must be a dict"):
        channel.init([jnp.zeros(2)])
    with pytest.raises(ValueError, match="only"):
        channel.init({"v": jnp.zeros(2)})


# --- optax transformations ---------------------------------------------------


def test_at_client_keeps_a_state_for_each_client():
    """Three rounds of a momentum 1/2 multiply an update by 1 + 1/2 + 1/4."""
    _, messages, _ = deliver(jaxfl.at_client(optax.trace(0.5)), rounds=3)
    for message, sent in zip(messages, PAYLOADS, strict=True):
        np.testing.assert_allclose(message.payload["w"], 1.75 * sent["w"])


def test_at_server_keeps_one_state_and_acts_on_the_aggregate():
    """A normaliser of the mean, not the mean of normalised ones."""
    payload, messages, _ = deliver(
        chain(jaxfl.at_server(optax.trace(0.5)), mean()), rounds=3
    )
    np.testing.assert_allclose(payload["w"], 1.75 * average("w", WEIGHTS), rtol=1e-6)
    unit, _, _ = deliver(
        chain(jaxfl.at_server(optax.normalize_by_update_norm()), mean())
    )
    whole = {k: average(k, WEIGHTS) for k in ("w", "n")}
    length = np.sqrt(sum(np.sum(x**2) for x in whole.values()))
    np.testing.assert_allclose(unit["w"], whole["w"] / length, rtol=1e-5)


# --- chain -------------------------------------------------------------------


def affine(scale, shift):
    """Encodes x -> scale x + shift; decodes y -> scale y + shift: none commute."""

    def act(payload):
        return jax.tree.map(lambda x: scale * x + shift, payload)

    def encode(ctx, message, server_state, client_state):
        return message._replace(payload=act(message.payload)), client_state, ()

    def decode(ctx, payload, server_state, report):
        return act(payload), server_state

    return Channel(lambda payload: ((), ()), encode, decode)


def test_chain_encodes_left_to_right_and_decodes_right_to_left():
    channel = chain(affine(2.0, 1.0), affine(3.0, -1.0))
    payload, messages, _ = deliver(channel, [jnp.array(5.0)], [1.0])
    assert messages[0].payload == 3 * (2 * 5 + 1) - 1  # 32
    assert payload == 2 * (3 * 32 - 1) + 1


def test_clip_left_and_right_of_mean():
    """Left of the mean it bounds an update, right of it a weighted one."""
    left, _, _ = deliver(chain(jaxfl.clip(1.0), mean()))
    norms = [float(optax.tree.norm(p)) for p in PAYLOADS]
    clipped = [p["w"] / max(1.0, n) for p, n in zip(PAYLOADS, norms, strict=True)]
    np.testing.assert_allclose(
        left["w"], np.average(clipped, axis=0, weights=WEIGHTS), rtol=1e-5
    )
    right, _, _ = deliver(chain(mean(), jaxfl.clip(1.0)))
    shares = [
        w * p["w"] / max(1.0, w * n)
        for w, p, n in zip(WEIGHTS, PAYLOADS, norms, strict=True)
    ]
    np.testing.assert_allclose(
        right["w"], np.sum(shares, axis=0) / np.sum(WEIGHTS), rtol=1e-5
    )


def test_layers_draw_from_different_keys():
    def draw(ctx, message, server_state, client_state):
        return message, client_state, jax.random.bits(ctx.key)

    drawing = Channel(lambda p: ((), ()), draw, lambda ctx, p, s, r: (p, s))
    _, _, reports = deliver(chain(drawing, drawing))
    assert len({int(x) for report in reports for x in report}) == 6


def test_chain_takes_channels():
    with pytest.raises(TypeError, match=r"channels\[1\]"):
        chain(mean(), mean)  # type: ignore[arg-type]
    assert chain(mean()).layers is None  # a chain of one is that one
    assert len(chain(mean(), chain(), chain(mean(), mean())).layers or ()) == 3
