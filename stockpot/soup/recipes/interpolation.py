"""WiSE-FT (Wortsman et al. 2021, arXiv:2109.01903): weights on the line from the init to a fine-tuned model or soup. Moving back towards
the init often costs little in distribution and gains under shift.
"""

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Places on the line: 0 is the init, 1 the soup."""


def coefficients(members: int, alpha: float) -> list[float]:
    """Weights for `average([init, *members])` that give (1 - alpha) * init + alpha * mean of the members."""
    return [1 - alpha, *[alpha / members] * members]
