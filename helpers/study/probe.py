"""What does an untaught encoder know? A linear probe on its frozen states."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def linear_probe(train: Tensor, targets: Tensor, test: Tensor, classes: int) -> Tensor:
    """Log-probabilities (n_test, classes) by multinomial logistic regression on frozen features.

    `train` (n, d) with `targets` (n,) are its training examples, `test` (n_test, d) the others;
    features are standardised. The L2 penalty is the one of PENALTIES with the least NLL on the last
    fifth of the training examples when fitted to the others; then all are used.
    """
    n = len(train) - max(1, len(train) // 5)
    fitted, held_out = train[:n], train[n:]

    def error(penalty: float) -> float:
        logprobs = logistic(fitted, targets[:n], held_out, classes, penalty)
        return float(nll_loss(logprobs, targets[n:]))

    best = min(PENALTIES, key=error)
    return logistic(train, targets, test, classes, best)


def logistic(
    train: Tensor,
    targets: Tensor,
    test: Tensor,
    classes: int,
    penalty: float,
) -> Tensor:
    """Log-probabilities of the minimum of mean NLL + penalty * |W|^2 / 2, float64, by L-BFGS."""
    train = train.double()
    centre = train.mean(0)
    width = train.std(0).clamp(min=1e-6)
    train = (train - centre) / width
    test = (test.double() - centre) / width
    weight = torch.zeros(
        train.shape[1], classes, dtype=torch.float64, requires_grad=True
    )
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS(
        [weight, bias], max_iter=200, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        descent.zero_grad()
        nll = cross_entropy(train @ weight + bias, targets)
        loss = nll + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        descent.step(objective)
    logits = test @ weight + bias
    return logits.detach().log_softmax(1)
