"""What does an untaught encoder know? A linear probe on its frozen states."""

import torch

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def linear_probe(
    known: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor, classes: int
) -> torch.Tensor:
    """Log-probabilities (n_asked, classes) by multinomial logistic regression on frozen features.

    `known` (n, d) with `targets` (n,) are its training examples, `asked` (n_asked, d) the others;
    features are standardised. The L2 penalty is the one of PENALTIES with the least NLL on the last
    fifth of the training examples when fitted to the others; then all are used.
    """
    n = len(known) - max(1, len(known) // 5)

    def held_out(penalty: float) -> float:
        logprobs = logistic(known[:n], targets[:n], known[n:], classes, penalty)
        return float(torch.nn.functional.nll_loss(logprobs, targets[n:]))

    return logistic(known, targets, asked, classes, min(PENALTIES, key=held_out))


def logistic(
    known: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor, classes: int, penalty: float
) -> torch.Tensor:
    """Log-probabilities of the minimum of mean NLL + penalty * |W|^2 / 2, float64, by L-BFGS."""
    centre, width = known.double().mean(0), known.double().std(0).clamp(min=1e-6)
    known, asked = ((x.double() - centre) / width for x in (known, asked))
    weight = torch.zeros(known.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        descent.zero_grad()
        nll = torch.nn.functional.cross_entropy(known @ weight + bias, targets)
        loss = nll + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        descent.step(objective)
    return (asked @ weight + bias).detach().log_softmax(1)
