"""Synthetic(alpha, beta): clients whose models and inputs differ as asked."""

import numpy as np


def synthetic(
    alpha: float,
    beta: float,
    *,
    num_clients: int = 30,
    seed: int,
    iid: bool = False,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Linear classification of 60 normal features into 10 classes, by client.

    Client k has its own labels and inputs,

      y = argmax(W_k x + b_k),  W_k, b_k ~ N(u_k, 1),  u_k ~ N(0, alpha^2),
      x ~ N(v_k, Sigma),  Sigma_jj = j^-1.2,  v_k,j ~ N(B_k, 1),  B_k ~ N(0, beta^2),

    and 50 + floor(LogNormal(4, 2^2)) examples: a few clients have most of them. Alpha
    is how much the clients' models differ, beta how much their inputs do. The paper
    writes N(0, alpha) and N(0, beta); that they are standard deviations is so in its
    code. As there, u_k is one number: it adds the same to every class's logit, so that
    alpha changes the clients' models but not their labels.

    Args:
      alpha: at least 0.
      beta: at least 0.
      num_clients: N.
      seed: of the draws.
      iid: True for the same W, b ~ N(0, 1) and v = 0 at all clients; alpha and beta
        are then 0.

    Returns:
      `({"x": float32 [E, 60], "y": int32 [E]}, client ids int32 [E])`.

    Raises:
      ValueError: an argument is out of its range, or `iid` with other than zeros.

    Example:
      >>> examples, ids = synthetic(1.0, 1.0, seed=0)
      >>> examples["x"].shape[1], len(np.unique(ids)), int(np.bincount(ids).min())
      (60, 30, 50)

    Reference: Li et al. 2020, "Federated Optimization in Heterogeneous Networks",
      arXiv:1812.06127, section 5.1; after Shamir, Srebro, Zhang 2014, arXiv:1312.7853.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} was {value}; it should be finite, at least 0")
    if iid and (alpha or beta):
        raise ValueError(f"alpha, beta were {alpha}, {beta}; with iid they should be 0")
    if num_clients < 1:
        raise ValueError(f"num_clients was {num_clients}; it should be at least 1")
    features, classes = 60, 10
    rng = np.random.default_rng(seed)
    sizes = 50 + rng.lognormal(4, 2, num_clients).astype(np.int64)
    deviation = np.arange(1, features + 1) ** -0.6  # the root of Sigma's diagonal

    u = rng.normal(0, alpha, num_clients)
    centre = rng.normal(0, beta, num_clients)
    shared = rng.standard_normal((features + 1, classes))
    x, y = [], []
    for k, size in enumerate(sizes):
        own = rng.standard_normal((features + 1, classes))
        v = rng.normal(centre[k], 1, features)
        w, v = (shared, 0.0) if iid else (u[k] + own, v)
        inputs = v + deviation * rng.standard_normal((size, features))
        x.append(inputs)
        y.append(np.argmax(inputs @ w[:-1] + w[-1], axis=1))
    return (
        {
            "x": np.concatenate(x).astype(np.float32),
            "y": np.concatenate(y).astype(np.int32),
        },
        np.repeat(np.arange(num_clients, dtype=np.int32), sizes),
    )
