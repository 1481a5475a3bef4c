"""An attack on the noise: what an adversary can tell, the accountant must have said.

Whoever sees all models looks for one client whose update it knows, a canary, in many
worlds with it and without it. That gives a lower bound on epsilon.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import GaussianDpEvent, pld
from jax_privacy.auditing import CanaryScoreAuditor

import jaxfl
from jaxfl import chain, clip, mean, privacy
from jaxfl.channel import mechanisms

WORLDS, ROUNDS, Z, C, D, K, DELTA = 2000, 4, 1.5, 0.5, 8, 5, 1e-2


def loss(w, batch, key):
    return 0.5 * jnp.sum((w - batch["x"]) ** 2, -1)


def scores(noise) -> tuple[np.ndarray, np.ndarray]:
    """How far the model went towards the canary, with it and without, in each world."""
    x = np.random.default_rng(0).normal(size=(K, D)).astype(np.float32)
    x[-1] = 100.0 * np.eye(D)[0]  # always clipped, and always in one direction
    data = jaxfl.from_arrays(jnp.asarray(x), jnp.zeros(K), np.arange(K), K)
    algorithm = jaxfl.fedavg(loss, optax.sgd(0.1), batch_size=None)
    channel = chain(clip(C), mean(denominator=K), noise)
    federation = jaxfl.federate(algorithm, channel)

    def world(key, there):
        alive = jnp.ones(K, bool).at[-1].set(there)
        cohort = jaxfl.Cohort(jnp.arange(K), data, jnp.ones(K), alive)
        state = federation.init(jnp.zeros(D), data)
        for _ in range(ROUNDS):
            state, _ = federation.round(key, state, cohort)
        return state.params[0]

    keys = jax.random.split(jax.random.key(0), 2 * WORLDS)
    there = jnp.arange(2 * WORLDS) < WORLDS
    found = np.asarray(jax.jit(jax.vmap(world))(keys, there))
    return found[:WORLDS], found[WORLDS:]


def accounted(noise_multiplier) -> float:
    accountant = pld.PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier), ROUNDS)
    return accountant.get_epsilon(DELTA)


def halved(noise_multiplier):
    """What says that it adds noise, and adds half of it."""
    said, done = (privacy.gaussian(z) for z in (noise_multiplier, noise_multiplier / 2))
    return said._replace(decode=done.decode)


def audited(noise) -> float:
    """A lower bound on epsilon, at 95 %, of noise that is normal."""
    auditor = CanaryScoreAuditor(*scores(noise))
    return auditor.epsilon_from_gdp(significance=0.05, delta=DELTA)


def test_what_an_adversary_can_tell_is_less_than_what_was_accounted_for():
    bound = audited(privacy.gaussian(Z))
    assert 0.6 * accounted(Z) < bound < accounted(Z)


def test_half_the_noise_is_found_out():
    noise = halved(Z)
    (said,) = mechanisms(chain(clip(C), mean(denominator=K), noise))
    assert said == privacy.Gaussian(Z)
    bound = audited(noise)
    assert bound > 1.2 * accounted(Z)
    assert bound < accounted(Z / 2)
