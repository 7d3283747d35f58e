"""The fields of `loader` and `train` in a config's section: a signature each, which the schema is made from."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import diffax.training.optimizer  # noqa: F401  it names the optimizers
from diffax.components import RUNTIME, TRAINING, In, Length, Of
from diffax.errors import UserError

_COUNT = 2**31 - 1


def train(
    *,
    num_train_steps: Annotated[int, In(1, _COUNT), RUNTIME] = 800_000,
    batch_size: Annotated[int, In(1, 10**7), TRAINING] = 128,
    accumulate: Annotated[int, In(1, 10**5), TRAINING] = 1,
    optimizer: Annotated[Any, Of("optimizer", "adam"), TRAINING],
    learning_rate: Annotated[float, In(0, 10, above=True), TRAINING] = 2e-4,
    warmup_steps: Annotated[int, In(0, _COUNT), TRAINING] = 5000,
    anneal: Annotated[Literal["none", "linear", "cosine"], TRAINING] = "none",
    grad_clip: Annotated[float, In(0, 10**6), TRAINING] = 1.0,
    sam: Annotated[float, In(0, 100), TRAINING] = 0.0,
    ema: Annotated[tuple[float, ...], In(0, 1, below=True), Length(0, 8), TRAINING] = (0.9999,),
    ema_warmup: Annotated[bool, TRAINING] = False,
    log_every: Annotated[int, In(1, _COUNT), RUNTIME] = 100,
    save_every: Annotated[int, In(1, _COUNT), RUNTIME] = 10_000,
    sample_every: Annotated[int, In(0, _COUNT), RUNTIME] = 10_000,
    keep: Annotated[int, In(1, 10**6), RUNTIME] = 3,
    max_nonfinite: Annotated[int, In(1, _COUNT), RUNTIME] = 10,
    start_from: Annotated[str, RUNTIME] = "",
) -> None:
    """How a model is trained.

    Args:
      num_train_steps: length of the training, in updates.
      batch_size: examples of one update, over all devices and processes.
      accumulate: microbatches of one update, computed one after the other to save memory.
      optimizer: the update rule.
      learning_rate: its highest value.
      warmup_steps: updates over which the learning rate rises from 0.
      anneal: how the learning rate falls to 0 at the last step.
      grad_clip: largest global norm of the gradient; 0: not clipped.
      sam: rho of sharpness-aware minimisation; 0: without.
      ema: decays of the averages of the parameters; sampling uses the first during training.
      ema_warmup: start the averages with a short memory.
      log_every: steps between rows of metrics.jsonl.
      save_every: steps between checkpoints.
      sample_every: steps between samples; 0: only at the end.
      keep: how many of the newest checkpoints stay.
      max_nonfinite: steps in a row without a finite loss and gradient that end the run.
      start_from: workdir or file whose parameters a new run starts from.
    """


def loader(
    *,
    flip: Annotated[bool, TRAINING] = False,
    crop: Annotated[Literal["center", "random"], TRAINING] = "center",
    max_bad: Annotated[int, In(0, _COUNT), RUNTIME] = 100,
    workers: Annotated[int, In(0, 1024), RUNTIME] = 0,
    shuffle_seed: Annotated[int, In(0, _COUNT), TRAINING] = 0,
    embeddings: Annotated[str, RUNTIME] = "",
) -> None:
    """How batches are made of a data set.

    Args:
      flip: mirror half of the pictures, drawn at random.
      crop: where a picture that is not square is cropped.
      max_bad: unreadable records that are skipped before the run ends.
      workers: processes that read records; 0: threads of this one.
      shuffle_seed: of the order of the records, besides the run's seed.
      embeddings: folder of embeddings made by --mode=embed; empty: computed as pictures are read.
    """


def check(section: Mapping[str, Any], path: str, *, device_count: int, process_count: int) -> None:
    """Checks what concerns several fields of `train`.

    Args:
      section: the fields of `train`.
      path: of the section, for the error.
      device_count: of all processes.
      process_count: how many processes take part.

    Raises:
      UserError: averages repeat, or the batch cannot be divided among devices and processes.
    """
    if len(set(section["ema"])) < len(section["ema"]):
        raise UserError(f"{path}.ema must be different decays, got {section['ema']!r}")
    batch_size, accumulate = section["batch_size"], section["accumulate"]
    for count, what in ((device_count, "devices"), (process_count, "processes")):
        parts = count * accumulate
        if batch_size % parts:
            times = f" x {accumulate} accumulated parts" if accumulate > 1 else ""
            low = batch_size // parts * parts
            use = f"{low} or {low + parts}" if low else f"{parts}"
            raise UserError(
                f"global batch {batch_size} is not divisible by {count} {what}{times} (use {use}); {path}.batch_size"
            )
