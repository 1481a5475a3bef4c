"""Models of sequences: the next token after every token, and how good it is."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxfl.models.adapters import Losses, Measures


class LSTM(nn.Module):
    """One LSTM layer, `[B, T, I] -> [B, T, H]`, from a state of zeros.

    `nn.RNN(nn.LSTMCell)` multiplies a token's input by its weights inside the loop
    over tokens; here all tokens' are one product before it.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.features
        gates = nn.Dense(
            4 * size, kernel_init=nn.initializers.glorot_uniform(), bias_init=_remember
        )(x)
        recurrent = self.param(
            "recurrent", nn.initializers.orthogonal(), (size, 4 * size)
        ).astype(gates.dtype)

        def step(carry, gates):
            h, c = carry
            i, f, g, o = jnp.split(gates + h @ recurrent, 4, -1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], size), gates.dtype)
        _, h = jax.lax.scan(step, (zeros, zeros), gates.swapaxes(0, 1))
        return h.swapaxes(0, 1)


def _remember(key, shape, dtype=jnp.float32):
    """Biases: 1 for the forget gate, so that a cell keeps what it has; else 0."""
    del key
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)


class Embedding(nn.Module):
    """Rows of a table, by one-hot vectors: a lookup's gradient is a slow scatter.

    NaN for a number that is no token's, so that it is not passed over in silence.
    """

    vocabulary: int
    features: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"x must be token numbers, int [B, T], got {tokens.dtype} "
                f"{tokens.shape}. (uint8 is taken for an image's bytes.)"
            )
        init = nn.initializers.normal(self.features**-0.5)
        table = self.param("kernel", init, (self.vocabulary, self.features))
        known = (tokens >= 0) & (tokens < self.vocabulary)
        rows = jax.nn.one_hot(tokens, self.vocabulary, dtype=table.dtype) @ table
        return jnp.where(known[..., None], rows, jnp.nan)


class CharLSTM(nn.Module):
    """An embedding, LSTM layers and a dense layer, see `char_lstm`."""

    vocabulary: int
    embedding: int = 8
    hidden: int = 256
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Embedding(self.vocabulary, self.embedding, name="embedding")(x)
        for _ in range(self.layers):
            x = LSTM(self.hidden)(x)
        return nn.Dense(self.vocabulary)(x)


def char_lstm(
    vocabulary: int = 90, *, embedding: int = 8, hidden: int = 256, layers: int = 2
) -> CharLSTM:
    """The character LSTM: an embedding in 8 dimensions, two layers of 256 units.

    Args:
      vocabulary: number of tokens; 90 are those of `data.shakespeare`.
      embedding: dimensions of a token's embedding.
      hidden: units of a layer.
      layers: number of LSTM layers.

    Returns:
      A linen module, `int [B, T] -> logits [B, T, vocabulary]` of the token that
      follows each; 820,522 parameters, as in Reddi et al. (McMahan et al. count
      866,578, with a vocabulary that they do not give).

    Example:
      >>> from jaxfl import models
      >>> model = models.from_linen(char_lstm(), jnp.zeros((1, 80), jnp.int32))
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      820522

    Reference:
      McMahan, Moore, Ramage, Hampson and Arcas (2017), Communication-Efficient Learning
      of Deep Networks from Decentralized Data, arXiv:1602.05629, section 3. Reddi et
      al. (2021), Adaptive Federated Optimization, arXiv:2003.00295, appendix C.
    """
    return CharLSTM(vocabulary, embedding, hidden, layers)


class Transformer(nn.Module):
    """A decoder-only transformer, see `transformer`."""

    vocabulary: int
    longest: int
    width: int
    heads: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        length = x.shape[1]
        if length > self.longest:
            raise ValueError(f"x has {length} tokens, longest is {self.longest}.")
        x = Embedding(self.vocabulary, self.width, name="embedding")(x)
        places = self.param(
            "places", nn.initializers.normal(0.05), (self.longest, self.width)
        )
        x = x + places[:length].astype(x.dtype)
        past = nn.make_causal_mask(jnp.ones((1, length)))
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=past)
            y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def transformer(
    vocabulary: int = 90,
    *,
    longest: int = 80,
    width: int = 128,
    heads: int = 4,
    layers: int = 2,
) -> Transformer:
    """A small decoder-only transformer: what follows a token depends on those before.

    Blocks of attention and of two dense layers (the first four times as wide, with
    GELU), each on its layer-normalised input and added to it; learned places.

    Args:
      vocabulary: number of tokens; 90 are those of `data.shakespeare`.
      longest: tokens of the longest sequence.
      width: of the embedding, and of every block.
      heads: of attention; they share the width.
      layers: number of blocks.

    Returns:
      A linen module, `int [B, T] -> logits [B, T, vocabulary]` of the token that
      follows each, T at most `longest`.

    Raises:
      ValueError: if `heads` does not divide `width`.

    Example:
      >>> from jaxfl import models
      >>> model = models.from_linen(transformer(), jnp.zeros((1, 80), jnp.int32))
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      430170

    Reference:
      Vaswani et al. (2017), Attention Is All You Need, arXiv:1706.03762; the decoder
      alone, normalised first, as in Radford et al. (2019), Language Models are
      Unsupervised Multitask Learners, section 2.3.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide width, got {heads=} and {width=}.")
    return Transformer(vocabulary, longest, width, heads, layers)


# -------------------------------------------------------- labels that have padding


def token_cross_entropy(padding: int = 0) -> Losses:
    """Softmax cross-entropy of each sequence, the mean over its real tokens, in nats.

    `f_b = sum_t m_bt f_bt / sum_t m_bt`, with `m_bt` 0 where the label is padding. A
    sequence without any real token has the loss 0, one with a label that is no token
    NaN, as in `cross_entropy`.

    Args:
      padding: the label of what is no part of the sequence.

    Returns:
      `(logits [B, T, C], labels int [B, T]) -> float32 [B]`, for the argument `loss` of
      the adapters.

    Example:
      >>> loss = token_cross_entropy(padding=0)
      >>> loss(jnp.zeros((1, 3, 4)), jnp.array([[1, 2, 0]]))
      Array([1.3862944], dtype=float32)
    """

    def loss(logits, labels):
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
        known = (labels >= 0) & (labels < logits.shape[-1])
        return _over_real(jnp.where(known, losses, jnp.nan), labels != padding)

    return loss


def token_accuracy(padding: int = 0) -> Measures:
    """Share of a sequence's real tokens whose logit is the greatest.

    Args:
      padding: as in `token_cross_entropy`.

    Returns:
      `(logits [B, T, C], labels int [B, T]) -> {"accuracy": float32 [B]}`, for the
      argument `metrics` of the adapters.

    Example:
      >>> measure = token_accuracy(padding=0)
      >>> measure(jnp.eye(3)[None], jnp.array([[0, 1, 1]]))
      {'accuracy': Array([0.5], dtype=float32)}
    """

    def measure(logits, labels):
        right = jnp.argmax(logits, -1) == labels
        return {"accuracy": _over_real(right, labels != padding)}

    return measure


def _over_real(x: jax.Array, real: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(real, x, 0), -1, dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(real, -1), 1)
