"""Shakespeare by speaking role: the next character, in windows."""

import gzip
import hashlib
import os
from typing import Literal

import numpy as np

from jaxfl.data.files import read_checked
from jaxfl.data.tfds import prepared

_ORIGIN = (
    "https://github.com/karpathy/char-rnn (data/tinyshakespeare/input.txt, gzipped), "
    "or take source='tfds'"
)
_SHA256 = "bed00f18e91cda6838950656f0a95e07e0f4dbe8649a4b959f7602a7e53fbc6e"
_SHA256_OF_TEXT = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# The characters and their order are those of TensorFlow Federated, whose text is longer
# and has more of them than this one; so models have the parameters of published ones.
CHARACTERS = (
    "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?"
    'bfjnrvzBFJNRVZ"&*.26:\naeimquyAEIMQUY]!%)-159\r'
)
PAD, OOV, BOS, EOS = 0, len(CHARACTERS) + 1, len(CHARACTERS) + 2, len(CHARACTERS) + 3
VOCABULARY = len(CHARACTERS) + 4


def shakespeare(
    source: Literal["files", "tfds"],
    *,
    sequence_length: int = 80,
    min_characters: int = 500,
    data_dir: str | os.PathLike | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tiny Shakespeare by speaking role: training and test windows of characters.

    A client is a role, as in LEAF and in TensorFlow Federated (TFF), which take it from
    all plays; these are 40,000 lines of them. Roles are told apart by their name only.
    As in TFF, the 90 tokens are padding 0, 86 characters 1 to 86, an unknown character
    87, begin 88 and end 89; each speech stands between begin and end, a window's
    targets are its inputs one token later, and windows do not overlap. The first four
    fifths of a role's text are for training, the rest for testing. Unlike TFF, and like
    LEAF, a role's speeches are one text, cut into windows wherever they end; only its
    last window is padded.

    Args:
      source: where the text comes from.
        `"files"`: the file `shakespeare/tinyshakespeare.txt.gz` in the data folder,
        checksum verified.
        `"tfds"`: TensorFlow Datasets' `tiny_shakespeare`, see `mnist`.
      sequence_length: T, characters of a window; 80 in McMahan et al.
      min_characters: roles that say less are left out.
      data_dir: for `"files"` the data folder (None reads the environment variable
        `JAXFL_DATA_DIR`); for `"tfds"` the `data_dir` of TensorFlow Datasets.

    Returns:
      `(train, test)`, each `{"x": int32 [E, T], "y": int32 [E, T], "role": str [E]}`.
      All roles are in both, so that `natural(train["role"])` and
      `natural(test["role"])` are the same clients.

    Raises:
      ValueError: an unknown source, a length or size that is not positive, one above
        what the longest role says, or a text whose checksum is wrong.
      FileNotFoundError: the file is missing.
      ImportError: TensorFlow Datasets, or the TensorFlow it prepares with, is missing.

    Example:
      ```python
      train, test = shakespeare("files")
      data = from_arrays(train["x"], train["y"], natural(train["role"]))
      model = models.from_linen(
          models.char_lstm(), train["x"][:1],
          loss=models.token_cross_entropy(), metrics=models.token_accuracy())
      ```

    Reference: McMahan et al. 2017, arXiv:1602.05629, section 3; Caldas et al. 2018,
      "LEAF: A Benchmark for Federated Settings", arXiv:1812.01097. The text is that of
      Karpathy 2015, "The Unreasonable Effectiveness of Recurrent Neural Networks".
    """
    for name, value in (
        ("sequence_length", sequence_length),
        ("min_characters", min_characters),
    ):
        if value < 1:
            raise ValueError(f"{name} was {value}; it should be at least 1")
    if source == "files":
        content = read_checked(
            "shakespeare/tinyshakespeare.txt.gz",
            sha256=_SHA256,
            origin=_ORIGIN,
            data_dir=data_dir,
        )
        text = gzip.decompress(content)
    elif source == "tfds":
        splits = prepared("tiny_shakespeare", ("train", "validation", "test"), data_dir)
        text = b"".join(example["text"] for split in splits for example in split)
    else:
        raise ValueError(f"source was {source!r}; it should be 'files' or 'tfds'")
    found = hashlib.sha256(text).hexdigest()
    if found != _SHA256_OF_TEXT:
        raise ValueError(
            f"the SHA-256 of the text was {found} and should be {_SHA256_OF_TEXT}"
        )
    said = {
        role: speeches
        for role, speeches in sorted(speeches_by_role(text.decode()).items())
        if sum(map(len, speeches)) >= min_characters
    }
    if not said:
        raise ValueError(f"min_characters was {min_characters}; no role says so much")
    tokens = {role: to_tokens(speeches) for role, speeches in said.items()}
    cut = {role: round(0.8 * len(all_)) for role, all_ in tokens.items()}
    return (
        _windows({r: t[: cut[r]] for r, t in tokens.items()}, sequence_length),
        _windows({r: t[cut[r] :] for r, t in tokens.items()}, sequence_length),
    )


def speeches_by_role(text: str) -> dict[str, list[str]]:
    """What each role says, in order.

    Speeches are separated by an empty line and begin with a line `ROLE:`; what does not
    is left out.

    Args:
      text: of plays.

    Returns:
      Speeches by role, each with its lines and without its first.

    Example:
      >>> speeches_by_role("All:\\nSpeak, speak.\\n\\nExeunt\\n\\nAll:\\nResolved.\\n")
      {'All': ['Speak, speak.', 'Resolved.']}
    """
    roles: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        head, _, speech = block.strip("\n").partition("\n")
        if head.endswith(":") and speech:
            roles.setdefault(head[:-1], []).append(speech)
    return roles


def to_tokens(speeches: list[str]) -> np.ndarray:
    """One text of speeches, each between the tokens for begin and end.

    Args:
      speeches: strings.

    Returns:
      Tokens, int32 `[T]`.

    Example:
      >>> to_tokens(["d", "hé"])
      array([88,  1, 89, 88,  2, 87, 89], dtype=int32)
    """
    number = {c: i for i, c in enumerate(CHARACTERS, start=PAD + 1)}
    return np.array(
        [
            token
            for speech in speeches
            for token in (BOS, *(number.get(c, OOV) for c in speech), EOS)
        ],
        np.int32,
    )


def _windows(texts: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Inputs, the tokens after them, and whose they are."""
    x, y, roles = [], [], []
    for role, tokens in texts.items():
        count = max(1, -(-(len(tokens) - 1) // length))
        padded = np.full(count * length + 1, PAD, np.int32)
        padded[: len(tokens)] = tokens
        x.append(padded[:-1].reshape(count, length))
        y.append(padded[1:].reshape(count, length))
        roles += [role] * count
    return {"x": np.concatenate(x), "y": np.concatenate(y), "role": np.array(roles)}
