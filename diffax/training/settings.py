"""stub"""

from typing import Annotated, Any
from diffax.components import In, Of, RUNTIME, TRAINING


def train(
    *,
    num_train_steps: Annotated[int, In(1), RUNTIME] = 800_000,
    batch_size: int = 128,
    accumulate: int = 1,
    learning_rate: float = 2e-4,
    ema: tuple[float, ...] = (0.9999,),
    start_from: str = "",
):
    """T."""
