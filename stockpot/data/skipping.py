"""How many samples may be unreadable: one rule for publishing, for training and for the linear probe."""


def may_skip(unreadable: int, samples: int, skip_fraction: float) -> bool:
    """Whether so many of the samples may be unreadable. The shares are compared, not the counts: 29 / 100 is the very number 0.29, and
    0.29 * 100 is just below 29."""
    return not unreadable or unreadable / samples <= skip_fraction
