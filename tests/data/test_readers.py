"""Client data in the formats of LEAF, FedJAX and TensorFlow Federated."""

import json
import sqlite3
import struct
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax.serialization import msgpack_serialize

import jaxfl
from jaxfl.data import client_rows, read_fedjax, read_leaf, read_tff


def of_client(data, client):
    """Its examples."""
    rows = client_rows(data)[client]
    return {name: np.asarray(x)[rows].tolist() for name, x in data.examples.items()}


# --- LEAF ---------------------------------------------------------------------


def write_leaf(file: Path, clients, **changes):
    content = {
        "users": list(clients),
        "hierarchies": [],
        "num_samples": [len(c["y"]) for c in clients.values()],
        "user_data": clients,
    }
    file.write_text(json.dumps(content | changes))


ANN = {"x": [[0.5, 1.0], [2.0, 3.0]], "y": [3, 1]}
BOB = {"x": [[0, 0]], "y": [2]}  # whole numbers, as JSON may have them
CAT = {"x": [[4.25, 5], [6, 7], [8, 9]], "y": [0, 0, 1]}


def test_leaf(tmp_path):
    """Several files; who is who; one client without examples."""
    write_leaf(tmp_path / "b.json", {"cat": CAT})
    empty = {"x": [], "y": []}
    write_leaf(tmp_path / "a.json", {"ann": ANN, "none": empty, "bob": BOB})
    data, names = read_leaf(tmp_path)
    assert names == ["ann", "none", "bob", "cat"]
    assert data.size.tolist() == [2, 0, 1, 3]
    for client, want in ((0, ANN), (2, BOB), (3, CAT)):
        assert of_client(data, client) == want
    assert data.examples["x"].dtype == np.float32
    assert data.examples["y"].dtype == np.int32


def test_leaf_by_names(tmp_path):
    """The ids of the training clients for the test clients; some are left out."""
    write_leaf(tmp_path / "a.json", {"ann": ANN, "bob": BOB, "cat": CAT})
    data, names = read_leaf(tmp_path, names=["cat", "eve", "ann"])
    assert names == ["cat", "eve", "ann"] and data.size.tolist() == [3, 0, 2]
    assert of_client(data, 2) == ANN and of_client(data, 0) == CAT


def test_leaf_text(tmp_path):
    """As in LEAF's Shakespeare: parse makes numbers of characters."""
    write_leaf(tmp_path / "a.json", {"ann": {"x": ["to be", "or no"], "y": [" ", "t"]}})
    with pytest.raises(ValueError, match=r"a\.json: client 'ann': x was of .*parse"):
        read_leaf(tmp_path)

    def codes(values):
        return {k: [list(s.encode()) for s in v] for k, v in values.items()}

    data, _ = read_leaf(tmp_path, parse=codes)
    assert of_client(data, 0)["x"] == [list(b"to be"), list(b"or no")]


def test_leaf_clients_called_x_and_y(tmp_path):
    clients = {"x": ANN, "y": BOB, "cat": CAT}
    write_leaf(tmp_path / "a.json", clients)
    data, names = read_leaf(tmp_path)
    assert names == ["x", "y", "cat"]
    assert [of_client(data, i) for i in range(3)] == [ANN, BOB, CAT]


def test_leaf_numbers(tmp_path):
    large = {"x": [2**31, 1], "y": [True, False]}
    write_leaf(tmp_path / "a.json", {"ann": large, "bob": {"x": [1], "y": [True]}})
    with pytest.raises(ValueError, match="'ann'.*x has integers of more than 32 bits"):
        read_leaf(tmp_path)
    data, _ = read_leaf(tmp_path, parse=lambda c: c | {"x": np.asarray(c["x"]) % 7})
    assert data.examples["x"].tolist() == [2**31 % 7, 1, 1]


RAGGED = {"x": [[1, 2], [3]], "y": [0, 1]}
WRONG = {
    "a client has fewer": (dict(num_samples=[2, 2]), "client 'bob' had .* have 2"),
    "sizes of others": (dict(num_samples=[2]), "2 users and 1 num_samples"),
    "no data": (dict(user_data={"ann": ANN}), "client 'bob' has no x and y"),
    "no y": (dict(user_data={"ann": ANN, "bob": {"x": [[0, 0]]}}), "client 'bob' has"),
    "ragged": (dict(user_data={"ann": RAGGED, "bob": BOB}), "client 'ann': "),
    "other shape": (
        dict(user_data={"ann": ANN, "bob": {"x": [[1]], "y": [0]}}),
        "client 'bob' had examples of the shapes",
    ),
    "x longer than y": (
        dict(user_data={"ann": {"x": ANN["x"], "y": [1]}, "bob": BOB}),
        "client 'ann' had",
    ),
    "twice": (
        dict(
            users=["ann", "bob", "ann"],
            num_samples=[2, 1, 2],
        ),
        "client 'ann'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_leaf_says_which_file_and_client(tmp_path, name):
    changes, message = WRONG[name]
    write_leaf(tmp_path / "bad.json", {"ann": ANN, "bob": BOB}, **changes)
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
        read_leaf(tmp_path)


def test_leaf_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\*\.json"):
        read_leaf(tmp_path)
    write_leaf(tmp_path / "a.json", {"ann": ANN})
    with pytest.raises(ValueError, match="no examples"):
        read_leaf(tmp_path, names=["eve"])
    with pytest.raises(ValueError, match="names"):
        read_leaf(tmp_path, names=["ann", "ann"])
    write_leaf(tmp_path / "b.json", {"ann": ANN})
    with pytest.raises(ValueError, match=r"b\.json: client 'ann' was there before"):
        read_leaf(tmp_path)
    (tmp_path / "b.json").write_text('{"users": [')
    with pytest.raises(ValueError, match=r"b\.json: not JSON"):
        read_leaf(tmp_path)
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"b\.json: had list"):
        read_leaf(tmp_path)


# --- FedJAX -------------------------------------------------------------------


def write_sqlite(path: Path, table: str, rows):
    with sqlite3.connect(path) as db:
        db.execute(table)
        marks = ", ".join("?" * len(rows[0]))
        db.executemany(f"INSERT INTO {table.split()[2]} VALUES ({marks})", rows)
    db.close()


FEDJAX = (
    "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, "
    "data BLOB NOT NULL, num_examples INTEGER NOT NULL)"
)


def digits(n, seed):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.integers(0, 256, (n, 4, 4)).astype(np.uint8),
        "y": rng.integers(0, 10, n).astype(np.int32),
    }


def packed(examples):
    return zlib.compress(msgpack_serialize(examples))


def test_fedjax(tmp_path):
    path, clients = (
        tmp_path / "digits.sqlite",
        {b"zoe": digits(3, 0), b"al": digits(1, 1)},
    )
    rows = [(name, packed(c), len(c["y"])) for name, c in clients.items()]
    write_sqlite(path, FEDJAX, rows)
    data, names = read_fedjax(path)
    assert names == ["zoe", "al"] and data.size.tolist() == [3, 1]
    assert data.examples["x"].dtype == np.uint8
    for client, want in enumerate(clients.values()):
        assert of_client(data, client) == {k: v.tolist() for k, v in want.items()}
    some, _ = read_fedjax(path, names=["al"])
    assert of_client(some, 0) == of_client(data, 1)


def test_fedjax_text(tmp_path):
    """Arrays of bytes, FedJAX's own extension of msgpack, to codes of characters."""
    lines = msgpack_serialize([[2], [b"to be", b"not"]])
    content = msgpack_serialize({"snippets": msgpack.ExtType(4, lines)})
    path = tmp_path / "text.sqlite"
    write_sqlite(path, FEDJAX, [(b"ann", zlib.compress(content), 2)])

    def codes(values):
        whole = b"".join(values["snippets"])
        return {"x": np.frombuffer(whole, np.uint8).reshape(-1, 4)}  # 4 examples of 2

    data, _ = read_fedjax(path, parse=codes)
    assert data.size.tolist() == [2]
    assert of_client(data, 0)["x"] == [list(b"to b"), list(b"enot")]
    with pytest.raises(ValueError, match=r"client 'ann': snippets was of object"):
        read_fedjax(path)


def test_fedjax_says_which_file_and_client(tmp_path):
    path = tmp_path / "bad.sqlite"
    good = b"ann", packed(digits(2, 0)), 2
    for row, message in [
        ((b"bob", b"no zlib", 2), "client 'bob': .*decompress"),
        ((b"bob", zlib.compress(b"\xc1"), 2), "client 'bob': "),
        ((b"bob", packed(digits(2, 0)), 3), "client 'bob' had .*should have 3"),
        ((b"bob", packed([1]), 1), "client 'bob': was a list"),
    ]:
        path.unlink(missing_ok=True)
        write_sqlite(path, FEDJAX, [good, row])
        with pytest.raises(ValueError, match=rf"bad\.sqlite: {message}"):
            read_fedjax(path)


def test_not_the_right_file(tmp_path):
    path = tmp_path / "a.sqlite"
    with pytest.raises(FileNotFoundError, match=r"a\.sqlite"):
        read_fedjax(path)
    assert not path.exists()
    path.write_bytes(b"\xfd7zXZ" * 300)
    with pytest.raises(ValueError, match=r"a\.sqlite: not an SQLite file.*unpacked"):
        read_tff(path, {"y": ()})
    path.unlink()
    write_sqlite(path, FEDJAX, [(b"ann", packed(digits(1, 0)), 1)])
    with pytest.raises(ValueError, match=r"table examples .*\['federated_data'\]"):
        read_tff(path, {"y": ()})


# --- TensorFlow Federated -----------------------------------------------------

TFF = (
    "CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL, "
    "serialized_example_proto BLOB NOT NULL)"
)


def varint(value):
    value %= 2**64
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values, pack=True):
    """A `tf.train.Feature`, its numbers packed or one by one, as writers may."""
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, v) for v in values))
    if isinstance(values[0], float):
        each = [struct.pack("<f", v) for v in values]
        tag = varint(1 << 3 | 5)
    else:
        each = [varint(v) for v in values]
        tag = varint(1 << 3)
    number = 2 if isinstance(values[0], float) else 3
    whole = field(1, b"".join(each)) if pack else b"".join(tag + v for v in each)
    return field(number, whole)


def example(pack=True, **features):
    entries = [
        field(1, field(1, name.encode()) + field(2, feature(values, pack)))
        for name, values in features.items()
    ]
    return field(1, b"".join(entries))


def test_the_wire_format_is_that_of_protocol_buffers():
    """A `tf.train.Example` as TensorFlow serialises it: {"a": int64 [1, 300, -1]}."""
    want = "0a180a160a016112111a0f0a0d01ac02ffffffffffffffffff01"
    assert example(a=[1, 300, -1]).hex() == want


@pytest.mark.parametrize("pack", [True, False])
def test_tff(tmp_path, pack):
    path = tmp_path / "emnist.sqlite"
    pixels = np.random.default_rng(0).random((5, 2, 3)).astype(np.float32)
    rows = [
        (split, client, example(pack, pixels=pixels[i].ravel().tolist(), label=[label]))
        for i, (split, client, label) in enumerate(
            [
                ("train", "zoe", 3),
                ("train", "al", -1),
                ("test", "zoe", 2),
                ("train", "zoe", 300),
                ("test", "bob", 0),
            ]
        )
    ]
    write_sqlite(path, TFF, rows)
    shapes = {"pixels": (2, 3), "label": ()}
    data, names = read_tff(path, shapes, split="train")
    assert names == ["al", "zoe"] and data.size.tolist() == [1, 2]
    want = {"pixels": pixels[[0, 3]].tolist(), "label": [3, 300]}
    assert of_client(data, 1) == want
    assert of_client(data, 0)["label"] == [-1]
    assert data.examples["label"].dtype == np.int32
    test, _ = read_tff(path, shapes, split="test", names=names)
    assert test.size.tolist() == [0, 1] and of_client(test, 1)["label"] == [2]
    assert read_tff(path, shapes)[0].size.tolist() == [1, 1, 3]


def test_tff_text(tmp_path):
    path = tmp_path / "text.sqlite"
    rows = [("train", "ann", example(tokens=[b"to", b"be"]))]
    write_sqlite(path, TFF, rows)

    def lengths(values):
        return {"x": [[len(word) for word in row] for row in values["tokens"]]}

    data, _ = read_tff(path, {"tokens": (2,)}, parse=lengths)
    assert of_client(data, 0) == {"x": [[2, 2]]}


def test_tff_says_which_file_and_client(tmp_path):
    path, good = tmp_path / "bad.sqlite", example(label=[1])
    for proto, message in [
        (good[:-1], "client 'bob': .*cut short"),
        (b"\x0b", "client 'bob': .*wire type 3"),
        (example(other=[1]), r"client 'bob': an example has no 'label'.*\['other'\]"),
        (example(label=[1, 2]), "client 'bob': 'label' .* has 2 numbers"),
    ]:
        path.unlink(missing_ok=True)
        rows = [("train", "ann", good), ("train", "bob", proto)]
        write_sqlite(path, TFF, rows)
        with pytest.raises(ValueError, match=rf"bad\.sqlite: {message}"):
            read_tff(path, {"label": ()})
    with pytest.raises(ValueError, match=r"split 'test'.*no examples"):
        read_tff(path, {"label": ()}, split="test")


def test_a_run_on_what_was_read(tmp_path):
    """The mean over clients of their examples, in one round."""
    write_leaf(tmp_path / "a.json", {"ann": ANN, "bob": BOB, "cat": CAT})
    data, _ = read_leaf(tmp_path)

    def loss(w, batch, key):
        return 0.5 * jnp.sum((w - batch["x"]) ** 2, -1)

    state, _ = jaxfl.simulate(
        jaxfl.federate(jaxfl.fedavg(loss, optax.sgd(1.0)), jaxfl.mean()),
        jnp.zeros(2),
        data,
        rounds=1,
        key=jax.random.key(0),
        progress=False,
    )
    want = np.mean(ANN["x"] + BOB["x"] + CAT["x"], axis=0)
    np.testing.assert_allclose(state.params, want, rtol=1e-6)
