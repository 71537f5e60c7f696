"""A linear probe: logistic regression on frozen features (Radford et al. 2021, section 3.2 and appendix A.3)."""

import dataclasses

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Int

from cli.errors import UserError

# Strengths that are tried, one a decade (appendix A.3 tries more).
STRENGTHS = tuple(10.0**power for power in range(-6, 3))
MAX_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A classifier of features.

    Attributes:
      weights: [e, k].
      bias: [k].
      mean: of the training features, subtracted first.
      scale: one number that the features are divided by, so that strengths mean the same for all networks.
      strength: of the L2 penalty: the loss is mean cross-entropy, nats, + strength / 2 |weights|^2.
    """

    weights: Float[np.ndarray, "e k"]
    bias: Float[np.ndarray, " k"]
    mean: Float[np.ndarray, " e"]
    scale: float
    strength: float

    def predict(self, features: Float[np.ndarray, "n e"]) -> Int[np.ndarray, " n"]:
        """The likeliest class of each row."""
        return np.argmax((features - self.mean) / self.scale @ self.weights + self.bias, axis=1)

    def accuracy(self, features: Float[np.ndarray, "n e"], labels: Int[np.ndarray, " n"]) -> float:
        """Share of rows that are classified right.

        Raises:
          UserError: if features are not finite: the likeliest of no numbers would be the first class.
        """
        _check_finite(features)
        return float(np.mean(self.predict(features) == labels))


def fit_probe(
    features: Float[np.ndarray, "n e"], labels: Int[np.ndarray, " n"], classes: int, strength: float
) -> LinearProbe:
    """Minimizes the penalized cross-entropy with L-BFGS, from zero, in float64.

    Raises:
      UserError: if features are not finite.
    """
    features = np.asarray(features, np.float64)
    _check_finite(features)
    mean = features.mean(axis=0)
    scale = float(np.sqrt(np.mean(np.square(features - mean)))) or 1.0
    x, target = (features - mean) / scale, np.eye(classes)[labels]
    shape = (x.shape[1] + 1, classes)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = np.split(flat.reshape(shape), [shape[0] - 1])
        log_p = scipy.special.log_softmax(x @ weights + bias, axis=1)
        loss = -np.mean(np.sum(target * log_p, axis=1)) + strength / 2 * np.sum(np.square(weights))
        slope = (np.exp(log_p) - target) / len(x)
        gradient = np.concatenate([x.T @ slope + strength * weights, slope.sum(axis=0, keepdims=True)])
        return loss, gradient.ravel()

    start, options = np.zeros(shape).ravel(), {"maxiter": MAX_ITERATIONS}
    solution = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    weights, bias = np.split(solution.x.reshape(shape), [shape[0] - 1])
    return LinearProbe(weights, bias[0], mean, scale, strength)


def choose_probe(
    features: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    *,
    validation_share: float = 0.2,
    seed: int = 0,
) -> LinearProbe:
    """Fits a probe whose strength does best on a part held back, then fits it again on everything.

    Args:
      features: of the training pictures.
      labels: their classes.
      classes: how many there are.
      validation_share: part of the rows that is held back.
      seed: of the choice of that part.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    held = max(1, round(len(order) * validation_share))
    check, fit = order[:held], order[held:]
    scores = [
        fit_probe(features[fit], labels[fit], classes, strength).accuracy(features[check], labels[check])
        for strength in STRENGTHS
    ]
    # Of several that do equally well, the strongest.
    best = max(range(len(STRENGTHS)), key=lambda i: (scores[i], STRENGTHS[i]))
    return fit_probe(features, labels, classes, STRENGTHS[best])


def _check_finite(features: Float[np.ndarray, "n e"]) -> None:
    broken = int(np.sum(~np.isfinite(features)))
    if broken:
        raise UserError(f"{broken} of {features.size} features are not finite, so no probe can be fitted on them")
