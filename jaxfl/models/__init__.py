"""Models: a small zoo in Flax, and adapters from a linen, nnx or plain model."""

from jaxfl.models.adapters import (
    Model,
    accuracy,
    cross_entropy,
    from_function,
    from_linen,
    from_nnx,
    scale,
    standardize,
)
from jaxfl.models.classifiers import (
    CNN,
    MLP,
    cnn,
    lecun_normal,
    logistic_regression,
    mlp,
    torch_uniform,
    two_nn,
)
from jaxfl.models.residual import ResNet, resnet18
from jaxfl.models.sequences import (
    CharLSTM,
    Transformer,
    char_lstm,
    token_accuracy,
    token_cross_entropy,
    transformer,
)

__all__ = [
    "Model",
    "from_linen",
    "from_nnx",
    "from_function",
    "scale",
    "standardize",
    "cross_entropy",
    "accuracy",
    "token_cross_entropy",
    "token_accuracy",
    "lecun_normal",
    "torch_uniform",
    "MLP",
    "logistic_regression",
    "mlp",
    "two_nn",
    "CNN",
    "cnn",
    "ResNet",
    "resnet18",
    "CharLSTM",
    "char_lstm",
    "Transformer",
    "transformer",
]
