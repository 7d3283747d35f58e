"""How the choices of a diffusion model fit together."""

from typing import Any

from diffax.diffusion import schedules
from diffax.diffusion.schedules import NoiseSchedule, Transition


def check(predicts: str, variance: str | float, loss: Any, schedule: NoiseSchedule) -> None:
    """Raises ValueError if prediction, variance, loss and schedule do not fit."""
    learned = str(variance).startswith("learned")
    if not schedule.num_timesteps:
        for field, clash in (("loss", getattr(loss, "discrete", False)), ("predicts", predicts == "previous_x")):
            if clash:
                raise ValueError(f"{field} needs discrete timesteps, but schedule is continuous; choose another")
    if learned and not getattr(loss, "trains_variance", False):
        raise ValueError(
            f"variance {variance!r} is not trained by the loss; use the loss 'hybrid' or 'vlb', or a fixed variance"
        )
    if not learned and getattr(loss, "needs_variance", False):
        raise ValueError(
            f"the loss trains a variance, but variance is {variance!r}; use 'learned_range', or the loss 'simple'"
        )


def grid(schedule: NoiseSchedule, steps: str) -> Transition:
    """The transitions of a sampling grid; raises ValueError if the schedule does not have it."""
    try:
        return schedules.build_steps(schedule, steps)
    except ValueError as error:
        raise ValueError(f"steps {steps!r} do not fit the schedule: {error}") from None
