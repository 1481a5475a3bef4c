"""The protocol of secure aggregation with real cryptography, between parties in memory.

What `secure_sum` simulates, for cohorts small enough to run it: X25519 agrees on keys
and HKDF-SHA256 derives them, ChaCha20 expands seeds to masks, ChaCha20-Poly1305 keeps
shares from the server, and shares are Shamir's. The server is honest but curious: it
follows the protocol, and what it is sent is all it learns from. Without the
signatures and the consistency check of the paper's last section it may not lie.

`Client` and `Server` have a method for each round; `aggregate` runs them all.

Reference: Bonawitz et al. 2017, arXiv:1611.04482, figure 4; with a graph that is not
complete, Bell et al. 2020, ePrint 2020/704, algorithm 2.
"""

import random
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from jaxfl.secure import shamir
from jaxfl.secure.graph import Graph, neighbourhoods

BYTES = 32  # of a key, a seed, a share


class Aborted(RuntimeError):
    """Too few clients are left: no sum can be had, and nothing else was revealed."""


class Refused(RuntimeError):
    """A client was asked for more than it may tell."""


class Keys(NamedTuple):
    """A client's public keys, 32 bytes each: for shares, and for masks."""

    shares: bytes
    masks: bytes


class Client:
    """One party with an input; each method is what it sends in one round.

    Args:
      client: its id, at least 0.
      neighbours: with whom it shares masks and secrets.
      threshold: t, how many of it and its neighbours can unmask it.
      bits: inputs are modulo 2^bits.
    """

    def __init__(
        self, client: int, neighbours: Iterable[int], threshold: int, bits: int = 32
    ):
        self.client, self.neighbours = client, frozenset(neighbours)
        self.threshold, self.bits = threshold, bits
        self._share_key, self._mask_key = _private_key(), _private_key()
        self._seed = secrets.randbelow(shamir.PRIME)
        self._keys: dict[int, Keys] = {}
        self._own_share = b""
        self._held: dict[int, bytes] = {}
        self._told = False

    def advertise_keys(self) -> Keys:
        """Round 0: two public keys."""
        return Keys(
            self._share_key.public_key().public_bytes_raw(),
            self._mask_key.public_key().public_bytes_raw(),
        )

    def share_keys(self, keys: Mapping[int, Keys]) -> dict[int, bytes]:
        """Round 1: to each neighbour a share of the mask key and of the own seed.

        Args:
          keys: of the neighbours that are there.

        Returns:
          For each, a ciphertext that only it can read.

        Raises:
          Aborted: if they and this client are fewer than the threshold.
        """
        self._keys = {v: keys[v] for v in self.neighbours & keys.keys()}
        self._enough(len(self._keys) + 1, "advertised keys")
        places = [u + 1 for u in (self.client, *self._keys)]  # 0 is the secret's
        secret = int.from_bytes(self._mask_key.private_bytes_raw(), "little")
        of_key = shamir.split(secret, self.threshold, places)
        of_seed = shamir.split(self._seed, self.threshold, places)
        pairs = {x - 1: _bytes(of_key[x]) + _bytes(of_seed[x]) for x in places}
        # It will never be one of those that drop out while it is here to tell.
        self._own_share = pairs.pop(self.client)[BYTES:]
        return {v: self._box(self.client, v, pair) for v, pair in pairs.items()}

    def masked_input(self, ciphertexts: Mapping[int, bytes], x: np.ndarray) -> bytes:
        """Round 2: the input behind the masks of those that shared theirs.

        Args:
          ciphertexts: from each neighbour that is still there.
          x: uint32 `[d]`, below 2^bits.

        Returns:
          `bits` a coordinate.

        Raises:
          Aborted: if they and this client are fewer than the threshold.
          ValueError: if x is not of that type.
        """
        if x.dtype != np.uint32 or x.ndim != 1 or (x > 2**self.bits - 1).any():
            raise ValueError(f"x must be uint32 [d], below 2^{self.bits}.")
        self._held = {v: self._open(v, c) for v, c in ciphertexts.items()}
        self._enough(len(self._held) + 1, "shared keys")
        y = x + expand(_bytes(self._seed), len(x))
        for v in self._held:
            seed = _agree(self._mask_key, self._keys[v].masks, b"jaxfl mask")
            mask = expand(seed, len(x))
            y = y + mask if self.client < v else y - mask
        return pack(y, self.bits)

    def unmask(self, survivors: Collection[int]) -> dict[int, bytes]:
        """Round 3: a share of each survivor's seed and of each other's mask key.

        Never both of one client: it answers once.

        Args:
          survivors: of this client and its neighbours, whose inputs arrived.

        Raises:
          Aborted: if they are fewer than the threshold.
          Refused: if it has answered before, is not among them, or holds no share of
            one of them.
        """
        if self._told:
            raise Refused(f"client {self.client}: shares are told once.")
        if not {self.client} <= set(survivors) <= {self.client, *self._held}:
            raise Refused(
                f"client {self.client}: survivors must be it and some of those that "
                f"shared keys with it, got {sorted(survivors)}."
            )
        self._enough(len(set(survivors)), "sent inputs")
        self._told = True
        return {self.client: self._own_share} | {
            v: pair[BYTES:] if v in survivors else pair[:BYTES]
            for v, pair in self._held.items()
        }

    def _enough(self, there: int, what: str) -> None:
        if there < self.threshold:
            raise Aborted(
                f"client {self.client}: of it and its neighbours only {there} {what}, "
                f"and the threshold is {self.threshold}."
            )

    def _key(self, sender: int, receiver: int) -> ChaCha20Poly1305:
        """A key for the one ciphertext from this sender to this receiver."""
        other = receiver if sender == self.client else sender
        label = b"jaxfl shares from %d to %d" % (sender, receiver)
        return ChaCha20Poly1305(
            _agree(self._share_key, self._keys[other].shares, label)
        )

    def _box(self, sender: int, receiver: int, pair: bytes) -> bytes:
        return self._key(sender, receiver).encrypt(bytes(12), pair, None)

    def _open(self, sender: int, ciphertext: bytes) -> bytes:
        return self._key(sender, self.client).decrypt(bytes(12), ciphertext, None)


class Server:
    """Passes on what clients send each other, and learns the sum of their inputs.

    Args:
      neighbours: of each client.
      threshold: t.
      length: d, coordinates of an input.
      bits: inputs are modulo 2^bits.
    """

    def __init__(
        self,
        neighbours: Mapping[int, Iterable[int]],
        threshold: int,
        length: int,
        bits: int = 32,
    ):
        self.neighbours = {u: frozenset(vs) for u, vs in neighbours.items()}
        self.threshold, self.length, self.bits = threshold, length, bits
        self._keys: dict[int, Keys] = {}
        self._shared: frozenset[int] = frozenset()
        self._sum = np.zeros(length, np.uint32)
        self.survivors: frozenset[int] = frozenset()

    def pass_on_keys(self, keys: Mapping[int, Keys]) -> dict[int, dict[int, Keys]]:
        """After round 0: to each client the keys of its neighbours."""
        self._enough(keys, "advertised keys")
        self._keys = dict(keys)
        return {u: {v: keys[v] for v in self.neighbours[u] & keys.keys()} for u in keys}

    def pass_on_shares(
        self, ciphertexts: Mapping[int, Mapping[int, bytes]]
    ) -> dict[int, dict[int, bytes]]:
        """After round 1: to each client the ciphertexts that are for it."""
        self._enough(ciphertexts, "shared keys")
        self._shared = frozenset(ciphertexts)
        return {
            u: {v: ciphertexts[v][u] for v in self.neighbours[u] & self._shared}
            for u in ciphertexts
        }

    def pass_on_survivors(
        self, inputs: Mapping[int, bytes]
    ) -> dict[int, frozenset[int]]:
        """After round 2: to each client which of its neighbours' inputs arrived."""
        self._enough(inputs, "sent inputs")
        self.survivors = frozenset(inputs)
        for y in inputs.values():
            self._sum = self._sum + unpack(y, self.length, self.bits)
        return {u: self.survivors & {u, *self.neighbours[u]} for u in inputs}

    def unmask(self, shares: Mapping[int, Mapping[int, bytes]]) -> np.ndarray:
        """After round 3: the sum of the survivors' inputs, uint32 `[d]`.

        Raises:
          Aborted: if there are fewer shares of a secret than the threshold.
        """
        self._enough(shares, "told shares")
        total = self._sum
        for u in self._shared:
            missing = self.survivors & self.neighbours[u]
            if u not in self.survivors and not missing:
                continue  # nobody masked with it
            held = {v + 1: told[u] for v, told in shares.items() if u in told}
            if len(held) < self.threshold:
                raise Aborted(
                    f"server: {len(held)} shares of the secret of client {u}, and the "
                    f"threshold is {self.threshold}."
                )
            few = sorted(held)[: self.threshold]
            secret = _bytes(
                shamir.combine({x: int.from_bytes(held[x], "little") for x in few})
            )
            if u in self.survivors:
                total = total - expand(secret, self.length)
                continue
            key = X25519PrivateKey.from_private_bytes(secret)
            for v in missing:
                seed = _agree(key, self._keys[v].masks, b"jaxfl mask")
                mask = expand(seed, self.length)
                total = total - mask if v < u else total + mask
        return total & np.uint32(2**self.bits - 1)

    def _enough(self, there: Collection[int], what: str) -> None:
        if len(there) < self.threshold:
            raise Aborted(
                f"server: only {len(there)} clients {what}, and the threshold is "
                f"{self.threshold}."
            )


class Aggregate(NamedTuple):
    """What a run of the protocol gives.

    Attributes:
      total: uint32 `[d]`, the sum of the survivors' inputs modulo 2^bits.
      survivors: whose inputs are in it.
      up: of each client, the bytes that it sent, without names and lists of clients.
      down: of each client, the bytes that it was sent, likewise.
    """

    total: np.ndarray
    survivors: frozenset[int]
    up: dict[int, int]
    down: dict[int, int]


def aggregate(
    inputs: Mapping[int, np.ndarray],
    graph: Graph,
    *,
    bits: int = 32,
    dropouts: Sequence[Collection[int]] = (),
) -> Aggregate:
    """Runs all rounds of the protocol between parties in memory.

    Args:
      inputs: client to uint32 `[d]`, below 2^bits.
      graph: who shares masks with whom, in random order, and the threshold.
      bits: inputs are modulo 2^bits.
      dropouts: for each of the rounds 0 to 3, who is gone before it sends.

    Raises:
      Aborted: if too few are left in some round.
      ValueError: if there is no such graph, or an input is not of its type.

    >>> inputs = {u: np.full(3, u, np.uint32) for u in range(5)}
    >>> run = aggregate(inputs, Graph(4, 3), dropouts=[[], [], [4]])
    >>> run.total.tolist(), sorted(run.survivors)
    ([6, 6, 6], [0, 1, 2, 3])
    """
    ring = list(inputs)
    random.SystemRandom().shuffle(ring)
    neighbours = neighbourhoods(ring, graph)
    length = len(next(iter(inputs.values())))
    server = Server(neighbours, graph.threshold, length, bits)
    there = {u: Client(u, neighbours[u], graph.threshold, bits) for u in inputs}
    up, down = dict.fromkeys(inputs, 0), dict.fromkeys(inputs, 0)
    drops = iter([*dropouts, *[()] * (4 - len(dropouts))])

    def each(send, size):
        """What those send that are still there, and its length."""
        for u in next(drops):
            there.pop(u, None)
        sent = {u: send(u, party) for u, party in there.items()}
        for u, message in sent.items():
            up[u] += size(message)
        return sent

    def received(messages, size):
        for u, message in messages.items():
            down[u] += size(message)
        return messages

    def keys_size(keys):
        return sum(len(key) for pair in keys.values() for key in pair)

    def size(pieces):
        return sum(map(len, pieces.values()))

    keys = each(lambda u, party: party.advertise_keys(), lambda keys: 2 * BYTES)
    keys = received(server.pass_on_keys(keys), keys_size)
    shares = each(lambda u, party: party.share_keys(keys[u]), size)
    shares = received(server.pass_on_shares(shares), size)
    masked = each(lambda u, party: party.masked_input(shares[u], inputs[u]), len)
    survivors = server.pass_on_survivors(masked)
    told = each(lambda u, party: party.unmask(survivors[u]), size)
    return Aggregate(server.unmask(told), server.survivors, up, down)


def expand(seed: bytes, length: int) -> np.ndarray:
    """A mask, uint32 `[length]`: ChaCha20's stream under a key that is used once.

    >>> hex(expand(bytes(32), 1)[0])  # RFC 8439, appendix A.1, vector 1
    '0xade0b876'
    """
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * length)), "<u4").astype(np.uint32)


def pack(x: np.ndarray, bits: int) -> bytes:
    """The lowest bits of each number, one after another.

    >>> pack(np.array([5, 2], np.uint32), 4).hex()
    '52'
    """
    every = np.unpackbits(x.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.packbits(every[:, 32 - bits :]).tobytes()


def unpack(packed: bytes, length: int, bits: int) -> np.ndarray:
    """The inverse of `pack`, uint32 `[length]`."""
    each = np.unpackbits(np.frombuffer(packed, np.uint8), count=length * bits)
    every = np.zeros((length, 32), np.uint8)
    every[:, 32 - bits :] = each.reshape(length, bits)
    return np.packbits(every, axis=1).view(">u4").ravel().astype(np.uint32)


def _private_key() -> X25519PrivateKey:
    """A new key, clamped as X25519 takes it anyway, so that it is in Shamir's field."""
    key = bytearray(secrets.token_bytes(BYTES))
    key[0] &= 248
    key[31] = key[31] & 127 | 64
    return X25519PrivateKey.from_private_bytes(bytes(key))


def _agree(key: X25519PrivateKey, other: bytes, label: bytes) -> bytes:
    """A key that both ends of a pair derive, each from its own and the other's."""
    secret = key.exchange(X25519PublicKey.from_public_bytes(other))
    return HKDF(SHA256(), BYTES, salt=None, info=label).derive(secret)


def _bytes(number: int) -> bytes:
    return number.to_bytes(BYTES, "little")
