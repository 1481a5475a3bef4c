"""Shakespeare by role: what a role says, in windows, and no window in both sets."""

import hashlib
import os
import sys
import types

import numpy as np
import pytest

import jaxfl.data
from jaxfl.data import natural, shakespeare

module = sys.modules["jaxfl.data.shakespeare"]
needs_files = pytest.mark.skipif(
    not os.environ.get("JAXFL_DATA_DIR"), reason="JAXFL_DATA_DIR is not set"
)
TEXT = (
    "All:\nSpeak, speak.\n\nFirst Citizen:\nYou are all resolved\nrather to die?\n\n"
    "Exeunt\n\nAll:\nResolved. resolved.\n"
)


def read(monkeypatch, text=TEXT, **options):
    """`shakespeare("tfds")` of another text, in three splits as there."""
    splits = [[{"text": part.encode()}] for part in (text[:40], text[40:60], text[60:])]
    monkeypatch.setattr(module, "prepared", lambda *_: splits)
    right = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(module, "_SHA256_OF_TEXT", right)
    return shakespeare("tfds", **options)


def words(tokens):
    marks = {module.PAD: "", module.BOS: "<", module.EOS: ">", module.OOV: "?"}
    return "".join(marks.get(t) or module.CHARACTERS[t - 1] for t in tokens if t)


def test_the_vocabulary_is_that_of_tff():
    assert len(set(module.CHARACTERS)) == 86 and module.VOCABULARY == 90
    assert (module.PAD, module.OOV, module.BOS, module.EOS) == (0, 87, 88, 89)


def test_windows_by_hand(monkeypatch):
    train, test = read(monkeypatch, sequence_length=8, min_characters=1)
    said = "<Speak, speak.><Resolved. resolved.>"
    for window in (train, test):
        assert window["x"].dtype == window["y"].dtype == np.int32
        np.testing.assert_array_equal(window["x"][:, 1:], window["y"][:, :-1])
    rows = train["role"] == "All"
    text = words(train["x"][rows].ravel())
    assert text == said[: round(0.8 * len(said))]
    # A target is the token after its input, also over the end of a window.
    inputs, targets = train["x"][rows].ravel(), train["y"][rows].ravel()
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    rows = test["role"] == "All"
    assert words(test["x"][rows].ravel()) == said[round(0.8 * len(said)) :]
    assert set(train["role"]) == set(test["role"]) == {"All", "First Citizen"}
    np.testing.assert_array_equal(np.unique(natural(test["role"])), [0, 1])


def test_small_roles_are_left_out(monkeypatch):
    train, _ = read(monkeypatch, sequence_length=8, min_characters=35)
    assert set(train["role"]) == {"First Citizen"}
    with pytest.raises(ValueError, match="min_characters was 1000"):
        read(monkeypatch, min_characters=1000)


@needs_files
def test_the_real_one():
    train, test = shakespeare("files")
    assert train["x"].shape == (10216, 80) and test["x"].shape == (2619, 80)
    roles, counts = np.unique(train["role"], return_counts=True)
    assert len(roles) == 180 and roles[counts.argmax()] == "GLOUCESTER"
    for x in (train["x"], train["y"], test["x"], test["y"]):
        assert x.min() == 0 and x.max() == module.EOS and (x != module.OOV).all()
    # A role's text and its tokens: two more for each speech, all of them once.
    speeches = module.speeches_by_role(
        module.gzip.decompress(
            module.read_checked(
                "shakespeare/tinyshakespeare.txt.gz", sha256=module._SHA256, origin=""
            )
        ).decode()
    )
    assert len(speeches) == 299
    both = sum((d["x"][d["role"] == "ROMEO"] != 0).sum() for d in (train, test))
    # The last token of a text is a target only, and a full last window has it not.
    want = sum(len(s) + 2 for s in speeches["ROMEO"])
    assert want - 2 <= both <= want


def test_what_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="source was 'web'"):
        shakespeare("web")  # pyright: ignore
    with pytest.raises(ValueError, match="sequence_length was 0"):
        shakespeare("files", sequence_length=0)
    with pytest.raises(FileNotFoundError, match="char-rnn"):
        shakespeare("files", data_dir=tmp_path)
    splits = [[{"text": b"All:\nOther words.\n"}]]
    monkeypatch.setattr(module, "prepared", lambda *_: splits)
    with pytest.raises(ValueError, match="SHA-256 of the text"):
        shakespeare("tfds")
    assert isinstance(jaxfl.data.shakespeare, types.FunctionType)
