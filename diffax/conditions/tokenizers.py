"""Tokenizers as components: GPT-2's as GLIDE uses it, CLIP's, and one that needs no file.

They are cheap to build; the published vocabulary is read, or downloaded once, when the first caption is tokenized.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from diffax.components import RUNTIME, In, component
from diffax.conditions import tokenizer


@dataclasses.dataclass(frozen=True)
class LazyTokenizer:
    """Captions -> ids, -1 at the padding.

    Attributes:
      kind: see `tokenizer.build`.
      vocab: its file or folder; '' for the default place.
      length: ids of a caption.
    """

    kind: str
    vocab: str
    length: int

    def __post_init__(self):
        if self.kind == "clip" and self.length < 3:
            raise ValueError(f"length must be at least 3 for CLIP's tokenizer, got {self.length}")

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""
        return tokenizer.VOCAB_SIZES[self.kind]

    @property
    def empty(self) -> np.ndarray:
        """[length] ids of the empty caption; no vocabulary is read."""
        ids = np.full(self.length, tokenizer.PADDING, np.int32)
        if self.kind == "clip":
            ids[:2] = self.vocab_size - 2, self.vocab_size - 1  # start and end
        return ids

    @functools.cached_property
    def loaded(self) -> tokenizer.Tokenizer:
        """The tokenizer itself.

        Raises:
          UserError: its vocabulary cannot be had.
        """
        return tokenizer.build(self.kind, vocab=self.vocab, length=self.length)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """[n, length] int32 ids of n captions; long ones are cut."""
        return self.loaded(list(captions))


@component("tokenizer", "glide")
def glide(*, length: Annotated[int, In(1, 4096)] = 128, vocab: Annotated[str, RUNTIME] = "") -> LazyTokenizer:
    """GPT-2's byte pairs on lower-cased text, as in GLIDE.

    Args:
      length: ids of a caption.
      vocab: vocab.bpe, or its folder; '' downloads it once.
    """
    return LazyTokenizer("glide", vocab, length)


@component("tokenizer", "clip")
def clip(*, length: Annotated[int, In(1, 4096)] = 77, vocab: Annotated[str, RUNTIME] = "") -> LazyTokenizer:
    """CLIP's byte pairs, with ids for start and end.

    Args:
      length: ids of a caption.
      vocab: bpe_simple_vocab_16e6.txt, or its folder; '' downloads it once.
    """
    return LazyTokenizer("clip", vocab, length)


@component("tokenizer", "demo")
def demo(*, length: Annotated[int, In(1, 4096)] = 16) -> LazyTokenizer:
    """A few English words and single bytes; needs no file.

    Args:
      length: ids of a caption.
    """
    return LazyTokenizer("demo", "", length)
