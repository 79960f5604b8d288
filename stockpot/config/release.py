"""What a soup must show to become the champion, and in which forms it is stored."""

from pydantic import Field

from stockpot.fields import Closed, Fraction


class GateSpec(Closed):
    """What a challenger must show to become champion. It is judged on the gate split, which nothing was selected on."""

    gate_tolerance: Fraction = Field(0.0, description="Largest loss of gate accuracy against the champion that still passes.")
    shift_tolerance: Fraction = Field(0.02, description="Largest loss of accuracy on any one shift suite that still passes.")
    suite_tolerances: dict[str, Fraction] = Field(default_factory=dict, description="Another tolerance for single suites, by name.")
    calibration_tolerance: Fraction | None = Field(
        None,
        description="Largest rise of the expected calibration error on the gate split that still passes. None: it is reported, not judged.",
    )
    latency_tolerance: float | None = Field(
        None,
        ge=0,
        description="Largest rise of the time for one image that still passes, as a share of the champion's (0.1: a tenth slower); both "
        "are timed in turn on one machine, and the median ratio counts. None: it is reported, not judged.",
    )
    size_tolerance: float | None = Field(
        None, ge=0, description="Largest growth of the weights' bytes that still passes, as a share of the champion's. None: reported only."
    )
    approval: bool = Field(
        False,
        description="Whether what passes also waits for a person: a run of `approve` is then suspended in Prefect, holding no worker and "
        "no GPU, until somebody resumes it and says yes or no; meanwhile the version is `challenger`.",
    )


class ReleaseSpec(Closed):
    """How a soup becomes a version, and who has the last word. None of it changes the soup, so none of it is part of a sweep's identity."""

    torch_export: bool = Field(
        False,
        description="Store the soup also as a pt2 archive, so that `mlflow.pytorch.load_model` works, without pickle. A second copy of the "
        "weights; it takes pixels in [0, 1] and gives logits. Decided when a soup is first stored.",
    )
