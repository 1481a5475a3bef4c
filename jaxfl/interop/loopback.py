"""A grid of Flower nodes that are all in this process."""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxfl.interop.records import flower_library


class Loopback:
    """A stand-in for Flower's `Grid` whose nodes are all in this process.

    Messages and nodes' states are made to bytes and back as on a network. An exception
    in the client app is raised here, and not an answer with an error. It is to try an
    app; `flwr run` simulates a grid of processes.

    Args:
      app: the `ClientApp` that all nodes run.
      node_configs: of each node, such as `{"partition-id": 0}`.
    """

    def __init__(self, app: Any, node_configs: Sequence[Mapping[str, Any]]):
        flower, serde = flower_library(), importlib.import_module("flwr.common.serde")
        identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
        # Of the sender of a message, which the runtime knows.
        identity.run_id, identity.node_id, identity.task_id = 1, 1, 1
        self._app, self._serde = app, serde
        self._states = {
            node: serde.context_to_proto(
                flower.Context(1, node, dict(config), flower.RecordDict(), {})
            )
            for node, config in enumerate(node_configs, 100)
        }

    def get_node_ids(self) -> Iterable[int]:
        """Who is connected."""
        return list(self._states)

    def send_and_receive(
        self, messages: Iterable[Any], *, timeout: float | None = None
    ) -> Iterable[Any]:
        """The answers to messages."""
        del timeout
        serde = self._serde
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            context = serde.context_from_proto(self._states[node])
            reply = self._app(self._travel(message), context)
            self._states[node] = serde.context_to_proto(context)
            replies.append(self._travel(reply))
        return replies

    def _travel(self, message):
        proto = self._serde.message_to_proto(message)
        return self._serde.message_from_proto(
            type(proto).FromString(proto.SerializeToString())
        )
