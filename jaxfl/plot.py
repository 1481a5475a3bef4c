"""One-line figures."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxfl.data.federated import ClientData, label_counts

if TYPE_CHECKING:
    import matplotlib.axes


def label_distribution(
    data: ClientData | Any,
    ax: "matplotlib.axes.Axes | None" = None,
    *,
    label: str = "y",
    share: bool = True,
) -> "matplotlib.axes.Axes":
    """A map of the classes of every client: clients across, classes upwards.

    The colour is the share of the client's examples that are of the class, dark for
    none and bright for all, on a scale that colour blindness and a grey print leave
    readable. The column of a client without examples is left white.

    Args:
      data: the clients' data, or their label counts, `[N, C]`.
      ax: the axes to draw on; None makes a figure.
      label: the key of the class labels in the examples.
      share: whether the colour is the share, from 0 to 1, or the number of examples.

    Returns:
      The axes; `ax.figure.savefig(path)` saves the figure.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: the counts are not `[N, C]`, or one is negative.
      TypeError, ValueError: as `label_counts`.

    Example:
      ```python
      import jaxfl.plot

      ax = jaxfl.plot.label_distribution(data)
      ax.figure.savefig("labels.png")
      ```
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "jaxfl.plot needs matplotlib: pip install 'jaxfl[plot]'"
        ) from error
    counts = label_counts(data, label) if isinstance(data, ClientData) else data
    counts = np.asarray(counts)
    if counts.ndim != 2 or not counts.size or counts.min() < 0:
        raise ValueError(
            f"data had counts of shape {counts.shape}; they should be [N, C], clients "
            "by classes, and at least 0"
        )
    sizes = counts.sum(axis=1, keepdims=True)
    values = np.ma.masked_where(
        np.broadcast_to(sizes == 0, counts.shape),
        counts / np.maximum(sizes, 1) if share else counts,
    )
    ax = ax or plt.figure(figsize=(6.4, 3.6), layout="constrained").add_subplot()
    image = ax.imshow(
        values.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        vmin=0,
        vmax=1 if share else None,
    )
    ax.figure.colorbar(
        image,
        ax=ax,
        label="share of the client's examples" if share else "examples (count)",
    )
    ax.set(xlabel="client (id)", ylabel="class (label)")
    for axis, length in zip((ax.xaxis, ax.yaxis), counts.shape, strict=True):
        # Every id where there is room for it.
        nbins = length if length <= 20 else "auto"
        axis.set_major_locator(MaxNLocator(nbins, integer=True, steps=[1, 2, 5, 10]))
    return ax
