"""One process of a run over several, or of one: see test_distributed.py."""

import json
import sys


def main(address: str, process: int, processes: int) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles sooner
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            address, processes, process, initialization_timeout=120
        )
    import numpy as np
    import optax
    import toy

    import jaxfl

    assert len(jax.devices()) == processes and len(jax.local_devices()) == 1
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), optax.adam(0.05), batch_size=2)
    federation = jaxfl.federate(
        algorithm,
        jaxfl.chain(jaxfl.at_client(optax.trace(0.5)), jaxfl.mean()),
        mesh=jaxfl.client_mesh() if processes > 1 else None,
    )

    def run(data):
        return jaxfl.simulate(
            federation,
            toy.params(),
            data,
            rounds=4,
            every=2,
            cohort_size=5,
            key=jax.random.key(0),
            evaluate=lambda state: {"b": state.params["b"]},
            progress=False,
        )

    state, history = run(toy.data())
    on_host = jaxfl.on_host(jax.tree.map(np.asarray, toy.data()), states=True)
    streamed, streamed_history = run(on_host)
    rows = streamed.clients[np.arange(toy.N)]  # type: ignore[reportIndexIssue]
    got = (streamed._replace(clients=rows), streamed_history)
    jax.tree.map(np.testing.assert_array_equal, got, (state, history))
    result = {
        "w": state.params["w"].tolist(),
        "b": history["b"].tolist(),
        "loss": history.clients.metrics["loss"].tolist(),
        "client": history.clients.client.tolist(),
        "own": state.clients.channel[0].trace["w"].tolist(),
    }
    print(json.dumps(result), flush=True)
    if processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
