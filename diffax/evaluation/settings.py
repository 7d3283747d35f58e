"""The fields of `config.eval`."""

from typing import Annotated, Any

from diffax.components import In, Length, Of


def evaluate(
    *,
    num: Annotated[int, In(0, 10**8)] = 1000,
    batch_size: Annotated[int, In(1, 10**6)] = 100,
    bpd_num: Annotated[int, In(0, 10**8)] = 64,
    steps: Annotated[tuple[str, ...], Length(0, 64)] = (),
    samplers: Annotated[tuple[str, ...], Length(0, 64)] = (),
    guidance: Annotated[tuple[float, ...], In(-(10**4), 10**4), Length(0, 64)] = (),
    levels: Annotated[tuple[float, ...], In(0, 1), Length(0, 64)] = (),
    template: str = "a photo of a {}.",
    classifier: Annotated[Any, Of("evaluation", "svc")],
) -> None:
    """What is scored.

    Args:
      num: samples of every combination of the choices below; 0: none.
      batch_size: pictures at once.
      bpd_num: pictures whose bits per dimension are computed.
      steps: sampling grids; empty: the config's.
      samplers: names of samplers; empty: the config's.
      guidance: scales of guidance; empty: the config's.
      levels: noise levels of the smaller picture; empty: the config's.
      template: the caption of a class, whose name stands for {}, for zero-shot accuracy.
      classifier: the evaluation classifier, which says what samples show.
    """
    del num, batch_size, bpd_num, steps, samplers, guidance, levels, template, classifier
