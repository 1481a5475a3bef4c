"""Sums of encrypted messages, by additively homomorphic encryption.

Clients encrypt under a public key, the server adds ciphertexts, and only who holds the
secret key can read the sum. `ckks` is fast and approximate, `paillier` slow and exact;
`total` puts either into a federation. Who holds what:

    clients      keys.public()    encrypt
    server       keys.public()    add
    key holder   keys             decrypt; takes the server's step, sends the model out

The key holder may be one of the clients or a third party. As long as it is not in
league with the server, the server learns nothing of any message, and the key holder
the sum. All this runs on the host, by TenSEAL and phe (`pip install 'jaxfl[he]'`), so
`import jaxfl` does not import it; the randomness is those libraries' own.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxfl import tree
from jaxfl.core import Aggregator

# 128 bits of security at this degree allow a modulus of 109 bits (Albrecht et al. 2018,
# the standard of homomorphicencryption.org). SEAL encrypts under both primes and then
# divides by the last, which leaves the error of rounding as the noise.
DEGREE, MODULUS_BITS = 4096, (60, 49)
SLOTS = DEGREE // 2
# What the modulus leaves for a sum, with a bit for the sign and one for the noise.
SUM_BITS = MODULUS_BITS[0] - 2


class Ciphertext(NamedTuple):
    """An encrypted vector, or the encrypted sum of several.

    Attributes:
      blocks: serialised ciphertexts, each of as many numbers as the key has slots.
      size: how many numbers in all.
      summands: how many messages it is the sum of.
    """

    blocks: tuple[bytes, ...]
    size: int
    summands: int = 1

    @property
    def num_bytes(self) -> int:
        """The length of all blocks."""
        return sum(map(len, self.blocks))


@dataclasses.dataclass(frozen=True)
class Ckks:
    """What a party holds of a CKKS context; made by `ckks`.

    Attributes:
      context: TenSEAL's, serialised, with the public key and without the secret one.
      limit: the largest magnitude of a number in a message.
      summands: the most messages in a sum.
      secret: the context with the secret key; None if the party has none.
    """

    context: bytes = dataclasses.field(repr=False)
    limit: float
    summands: int
    secret: bytes | None = dataclasses.field(default=None, repr=False)

    @property
    def slots(self) -> int:
        """Numbers in a block."""
        return SLOTS

    def public(self) -> "Ckks":
        """The same without the secret key."""
        return dataclasses.replace(self, secret=None)

    def encrypt_block(self, x: np.ndarray) -> bytes:
        padded = np.pad(x, (0, SLOTS - x.size))  # so that all blocks are as long
        context = _context(self.context)
        return _library("tenseal").ckks_vector(context, padded.tolist()).serialize()

    def add_blocks(self, blocks: tuple[bytes, ...]) -> bytes:
        first, *rest = (self._vector(self.context, block) for block in blocks)
        for other in rest:
            first += other
        return first.serialize()

    def decrypt_block(self, block: bytes, summands: int) -> np.ndarray:
        return np.array(self._vector(self.secret, block).decrypt())

    def _vector(self, context, block):
        return _library("tenseal").ckks_vector_from(_context(context), block)


@dataclasses.dataclass(frozen=True)
class Paillier:
    """What a party holds of a Paillier key, and its packing; made by `paillier`.

    Attributes:
      n: the public key, a product of two primes.
      limit: the largest magnitude of a number in a message.
      bits: of each number, as a fixed-point number.
      summands: the most messages in a sum.
      secret: the two primes; None if the party has none.
    """

    n: int = dataclasses.field(repr=False)
    limit: float
    bits: int
    summands: int
    secret: tuple[int, int] | None = dataclasses.field(default=None, repr=False)

    @property
    def width(self) -> int:
        """Bits that a number takes, with guard bits for the sum of all summands."""
        return self.bits + (self.summands - 1).bit_length()

    @property
    def slots(self) -> int:
        """Numbers in a block."""
        return (self.n.bit_length() - 1) // self.width

    @property
    def offset(self) -> int:
        """What stands for 0; `limit` is twice that."""
        return 2 ** (self.bits - 1) - 1

    def public(self) -> "Paillier":
        """The same without the secret key."""
        return dataclasses.replace(self, secret=None)

    def encrypt_block(self, x: np.ndarray) -> bytes:
        steps = np.rint(x * (self.offset / self.limit)).astype(np.int64) + self.offset
        packed = 0
        for step in reversed(steps.tolist()):
            packed = packed << self.width | step
        key = _library("phe").PaillierPublicKey(self.n)
        return self._bytes(int(key.raw_encrypt(packed)))

    def add_blocks(self, blocks: tuple[bytes, ...]) -> bytes:
        product = 1
        for block in blocks:
            product = product * int.from_bytes(block) % self.n**2
        return self._bytes(product)

    def decrypt_block(self, block: bytes, summands: int) -> np.ndarray:
        phe = _library("phe")
        key = phe.PaillierPrivateKey(phe.PaillierPublicKey(self.n), *self.secret or ())
        packed, mask = int(key.raw_decrypt(int.from_bytes(block))), 2**self.width - 1
        steps = [packed >> i * self.width & mask for i in range(self.slots)]
        return (np.array(steps) - summands * self.offset) * (self.limit / self.offset)

    def _bytes(self, ciphertext: int) -> bytes:
        return ciphertext.to_bytes(-(-self.n.bit_length() // 4))


Keys = Ckks | Paillier


def ckks(*, scale_bits: int = 42, summands: int = 100) -> Ckks:
    """A new pair of CKKS keys: sums of real numbers, with an error.

    A block of 2,048 numbers is a polynomial of N = 4,096 coefficients, scaled by 2^s
    and taken modulo a prime of 60 bits. A ciphertext is rounded, so that a sum of n
    messages has an error with standard deviation

        sqrt(n N / 2 (1 + 2 N / 3) / 12) 2^-s = sqrt(n) 2^(9.42 - s)

    and no number of a message may be larger than `limit = 2^(58 - s) / summands`.

    Client sends: 65,676 bytes for each 2,048 numbers, 32 a number (a float32 has 4).
    Server sees: ciphertexts, which are semantically secure at 128 bits.

    Decryptions must stay with the key holder: who has a ciphertext and what it decrypts
    to can compute the secret key, as the error gives the noise away.

    Args:
      scale_bits: s, 20 to 50: a bit more halves the error and `limit`.
      summands: the most messages in a sum.

    Raises:
      ImportError: TenSEAL is missing.
      ValueError: if an argument is out of range.

    >>> keys = ckks()
    >>> keys.limit, keys.public()
    (655.36, Ckks(limit=655.36, summands=100))
    >>> both = add(keys.public(), *(encrypt(keys.public(), [x, 0.5]) for x in (1, 2)))
    >>> decrypt(keys, both).round(6).tolist(), both.num_bytes
    ([3.0, 1.0], 65676)

    Reference: Cheon et al. 2017, ePrint 2016/421, as TenSEAL (Benaissa et al. 2021,
    arXiv:2104.03152) has it. On decryptions: Li, Micciancio 2021, ePrint 2020/1533.
    """
    _check_range("scale_bits", scale_bits, 20, 50)
    _check_range("summands", summands, 1, 2**20)
    tenseal = _library("tenseal")
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULUS_BITS)
    )
    context.global_scale = 2.0**scale_bits
    public, secret = (
        context.serialize(
            save_secret_key=secret, save_galois_keys=False, save_relin_keys=False
        )
        for secret in (False, True)
    )
    return Ckks(public, 2.0 ** (SUM_BITS - scale_bits) / summands, summands, secret)


def paillier(
    *, limit: float, bits: int = 32, summands: int = 100, key_bits: int = 3072
) -> Paillier:
    """A new pair of Paillier keys: sums of fixed-point numbers, exact and slow.

    A number x is rounded to `v = round(x / limit (2^(b-1) - 1))`, and as many of them
    as fit are packed into one plaintext, each shifted to be positive and with guard
    bits for the sum of S messages:

        m = sum_i (v_i + 2^(b-1) - 1) 2^(i w),    w = b + ceil(log2 S)

    so that a sum of plaintexts is that of its numbers, none of which carries into the
    next. Sums are exact; rounding errs by at most `limit / (2^b - 2)` a message.

    Client sends: a ciphertext of `2 key_bits` for each `(key_bits - 1) // w` numbers.
    Server sees: ciphertexts, semantically secure as long as n is not factored.

    Args:
      limit: the largest magnitude of a number in a message.
      bits: b, 2 to 52.
      summands: S, the most messages in a sum.
      key_bits: of n. 3,072 are held to be as secure as 128 bits; less is for tests.

    Raises:
      ImportError: phe is missing.
      ValueError: if an argument is out of range.

    >>> keys = paillier(limit=8.0, bits=16, summands=4, key_bits=512)
    >>> keys.slots, keys.public()
    (28, Paillier(limit=8.0, bits=16, summands=4))
    >>> both = add(keys.public(), *(encrypt(keys.public(), [x, -7]) for x in (1, 2)))
    >>> decrypt(keys, both).round(3).tolist(), both.num_bytes
    ([3.0, -14.0], 128)

    Reference: Paillier 1999, Public-Key Cryptosystems Based on Composite Degree
    Residuosity Classes; packing with guard bits as in Zhang et al. 2020, BatchCrypt
    (USENIX ATC), with a shift where they have two's complement.
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}.")
    _check_range("bits", bits, 2, 52)
    _check_range("summands", summands, 1, 2**20)
    _check_range("key_bits", key_bits, 128, 2**14)  # a number takes up to 72
    if key_bits % 2:
        raise ValueError(f"key_bits must be even, got {key_bits}.")
    public, secret = _library("phe").generate_paillier_keypair(n_length=key_bits)
    primes = int(secret.p), int(secret.q)
    return Paillier(int(public.n), float(limit), bits, summands, primes)


def workers(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that share the work of `encrypt`, `decrypt` and `total`; use `with`.

    They are started anew and not forked, which a process that runs JAX cannot bear: a
    script needs its `if __name__ == "__main__":`.
    """
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, spawn)


def encrypt(
    keys: Keys,
    x: Any,
    *,
    pool: concurrent.futures.Executor | None = None,
    progress: bool = False,
) -> Ciphertext:
    """Encrypts a vector, which takes no secret key.

    Args:
      keys: of the client, `keys.public()`.
      x: numbers `[n]`.
      pool: `workers(...)` that share the blocks; this process alone if None.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if x is not a vector, not finite, or beyond `keys.limit`.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 1:
        raise ValueError(f"x must be a vector [n], got shape {x.shape}.")
    largest = np.abs(x).max(initial=0.0)
    if not largest <= keys.limit:
        raise ValueError(
            f"x has a number of magnitude {largest:g}, and these keys take up to "
            f"{keys.limit:g}, of {keys.summands} summands: clip it, or make others."
        )
    blocks = np.split(x, range(keys.slots, x.size, keys.slots)) if x.size else []
    encrypted = _map(keys.encrypt_block, blocks, pool, progress, "encrypting")
    return Ciphertext(encrypted, x.size)


def add(keys: Keys, *ciphertexts: Ciphertext) -> Ciphertext:
    """Adds encrypted vectors, which takes no secret key.

    Args:
      keys: of the server, `keys.public()`.
      *ciphertexts: one or more, of one size.

    Raises:
      ValueError: if there are none, their sizes differ, or the sum would be of more
        messages than `keys.summands`.
    """
    sizes = {c.size for c in ciphertexts}
    if len(sizes) != 1:
        raise ValueError(f"ciphertexts must be of one size, got {sorted(sizes)}.")
    summands = sum(c.summands for c in ciphertexts)
    _check_summands(keys, summands)
    blocks = zip(*(c.blocks for c in ciphertexts), strict=True)
    return Ciphertext(tuple(map(keys.add_blocks, blocks)), sizes.pop(), summands)


def decrypt(
    keys: Keys,
    ciphertext: Ciphertext,
    *,
    pool: concurrent.futures.Executor | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Decrypts a vector or a sum of some, float64 `[n]`, by the secret key.

    Args:
      keys: of the key holder.
      ciphertext: from `encrypt` or `add` with the same keys.
      pool, progress: as for `encrypt`.

    Raises:
      ValueError: if keys have no secret.
    """
    if keys.secret is None:
        raise ValueError("keys must have the secret key to decrypt; these are public.")
    decrypt_block = functools.partial(keys.decrypt_block, summands=ciphertext.summands)
    blocks = _map(decrypt_block, ciphertext.blocks, pool, progress, "decrypting")
    return np.concatenate([*blocks, np.zeros(0)])[: ciphertext.size]


def total(
    keys: Keys,
    *,
    pool: concurrent.futures.Executor | None = None,
    progress: bool = False,
) -> Aggregator:
    """The sum of all messages as the key holder reads it, delivered to all who sent.

    `Dec(sum_{i in S} Enc(payload_i))`: each client's message is encrypted and the
    ciphertexts are added by `keys.public()`, and the sum is decrypted by `keys`. Like
    `jaxfl.total` but for the error of the encryption, so `mean` may stand before it;
    what is encrypted then is each client's weighted share, unless `mean` has a fixed
    denominator. It does not stream: the stack `[K, ...]` of plain messages is held.

    Client sends: its message, encrypted. Server sees: ciphertexts, who sent, and what
    goes in the header and reports of the channel, such as weights. Bits up: those of
    the serialised ciphertexts, and the header's; down: those of the plain broadcast,
    which comes from the key holder.

    Seconds of a processor for the 199,210 numbers of a 2NN: `ckks` 0.28 to encrypt a
    message, 0.14 to add ten, 0.06 to decrypt; 6.4 MB up a client, 8.1 times the
    float32; relative error 2e-8 (3e-8 as float32). `paillier` 91, 1.4 and 48, by a
    128th of them; 2.0 MB.

    Args:
      keys: with the secret key, as all parties are simulated here.
      pool, progress: as for `encrypt`.

    Returns:
      An `Aggregator`. Its round ends with an error if a message has a number beyond
      `keys.limit`. It raises TypeError when initialised with integers, and ValueError
      when traced with a cohort of more than `keys.summands`.

    Raises:
      ValueError: if keys have no secret.

    >>> from jaxfl import mean
    >>> from jaxfl.core import Context
    >>> payload, sent = jnp.array([[1.0, 5.0], [2.0, 9.0]]), jnp.array([True, True])
    >>> summed, _, () = total(ckks()).apply(None, payload, sent, ())
    >>> summed.round(5).tolist()
    [3.0, 14.0]
    """
    if keys.secret is None:
        raise ValueError("keys must have the secret key, as the sum is decrypted.")
    public = keys.public()

    def init(payload):
        tree.require_floats(payload, "homomorphic.total")
        return ()

    def on_host(stack, sent):
        stack, rows = np.asarray(stack), np.flatnonzero(sent)
        if not len(rows):
            return np.zeros(stack.shape[1:], np.float32)
        encrypted = (
            encrypt(public, stack[row], pool=pool, progress=progress) for row in rows
        )
        summed = functools.reduce(functools.partial(add, public), encrypted)
        read = decrypt(keys, summed, pool=pool, progress=progress)
        return read.astype(np.float32)

    def apply(ctx, payload, sent, state):
        one = jax.tree.map(lambda x: x[0], payload)
        _check_summands(keys, sent.shape[0])
        stack = jax.vmap(lambda x: ravel_pytree(x)[0].astype(jnp.float32))(payload)
        shape = jax.ShapeDtypeStruct(stack.shape[1:], jnp.float32)
        summed = jax.pure_callback(
            on_host, shape, stack, sent, vmap_method="sequential"
        )
        flat, unravel = ravel_pytree(one)
        return unravel(summed.astype(flat.dtype)), sent, state

    def bits(payload, bits):
        size = sum(x.size for x in jax.tree.leaves(payload))
        block = len(public.encrypt_block(np.zeros(1)))
        return jnp.float32(8 * block * -(-size // keys.slots))

    return Aggregator(init, apply, sums=True, bits=bits)


def _map(
    fn: Callable,
    blocks: Iterable,
    pool: concurrent.futures.Executor | None,
    progress: bool,
    title: str,
) -> tuple:
    """`fn` of every block, in this process or by a pool, with a bar or without."""
    blocks = list(blocks)
    if pool is None:
        done = map(fn, blocks)
    else:  # a chunk carries the key once
        done = pool.map(fn, blocks, chunksize=max(1, len(blocks) // 32))
    if progress:
        from rich.progress import track

        done = track(done, title, total=len(blocks))
    return tuple(done)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not (isinstance(value, int) and low <= value <= high):
        raise ValueError(
            f"{name} must be a whole number from {low} to {high}, got {value!r}."
        )


def _check_summands(keys: Keys, summands: int) -> None:
    if summands > keys.summands:
        raise ValueError(
            f"summands: a sum of {summands} messages is more than the keys were made "
            f"for, {keys.summands}."
        )


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"jaxfl.homomorphic needs {name}: pip install 'jaxfl[he]'"
        ) from error


@functools.lru_cache(maxsize=8)
def _context(serialised: bytes):
    return _library("tenseal").context_from(serialised)
