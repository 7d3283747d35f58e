"""Captions to token ids: the byte-level BPE of GPT-2 and of CLIP, and a small one for the embedded data (leaf).

Published vocabularies are not part of the package: they are read from a folder, or downloaded once and checked.
"""

import collections
import dataclasses
import difflib
import functools
import gzip
import hashlib
import html
import http.client
import io
import itertools
import logging
import os
import pathlib
import re
import sys
import unicodedata
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import ftfy
import numpy as np

from diffax.errors import UserError

log = logging.getLogger("diffax.conditions.tokenizer")

PADDING = -1
# Characters of a caption that are read for each token it may have: no caption's tokens are that long on average, and a
# file can be any size.
CHARACTERS = 32
_LARGEST_FILE = 16 * 2**20

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Captions to ids and back, from `build`.

    Attributes:
      name: what `build` calls it.
      vocab_size: ids are 0 .. vocab_size - 1.
      length: ids of a caption, padding included.
      encode: caption -> ids, lazily and as many as there are.
      decode: ids -> text, without padding and the ids that mark start and end. The ids are integers; one that is not in
        the vocabulary is a UserError.
      marks: ids put before and after those of a caption, () or (start, end); a caption that is cut keeps both.
    """

    name: str
    vocab_size: int
    length: int
    encode: Callable[[str], Iterator[int]]
    decode: Callable[[Iterable[int]], str]
    marks: tuple[int, ...] = ()

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Ids of captions, cut to `length` or padded with -1 behind.

        Any string has ids; what cannot be UTF-8 (a lone surrogate) counts as U+FFFD. The first caption that is cut is
        told of by one warning for the whole process.

        Returns:
          int32 [len(captions), length].

        Raises:
          UserError: something that is no string.
        """
        if isinstance(captions, str | bytes):
            raise UserError(f"one caption where a list is expected; {captions[:20]!r}; write [caption]")
        start, end = self.marks[:1], self.marks[1:]
        room = self.length - len(self.marks)
        out = np.full((len(captions), self.length), PADDING, np.int32)
        for number, (row, caption) in enumerate(zip(out, captions, strict=True)):
            if not isinstance(caption, str):
                raise UserError(
                    f"a caption is text, got {type(caption).__name__}; caption {number} of {len(captions)}; give a str"
                )
            ids = list(itertools.islice(self.encode(caption[: CHARACTERS * self.length]), room + 1))
            if len(ids) > room or len(caption) > CHARACTERS * self.length:
                _warn_once(
                    "cut", f"a caption of more than {room} tokens was cut, as later ones will be: {caption[:40]!r}"
                )
            ids = [*start, *ids[:room], *end]
            row[: len(ids)] = ids
        return out


def names() -> list[str]:
    """Every tokenizer that `build` knows."""
    return [*PUBLISHED, "demo"]


def build(name: str, *, vocab: str = "", length: int) -> Tokenizer:
    """A tokenizer by name.

    'glide': GPT-2's, on lower-cased text; no id marks start or end, so '' has no ids.
    'clip': CLIP's: Unicode repaired by ftfy, HTML unescaped twice, blanks collapsed, lower-cased; start id 49406, end
      id 49407.
      As in CLIP's code '<|endoftext|>' written in a caption is the end id.
    'demo': the words of the embedded data and single bytes; blanks collapsed, lower-cased; needs no file.

    (Facts from the code of openai/glide-text2im, glide_text2im/tokenizer.)

    Args:
      name: one of `names()`.
      vocab: the published merges, vocab.bpe for 'glide' and bpe_simple_vocab_16e6.txt for 'clip', plain or .gz: the
        file, or the folder that holds it. '' takes the folder in the environment variable DIFFAX_VOCAB or else the
        user's cache, where the file is downloaded if it is not there.
      length: ids of a caption; 128 in GLIDE, 77 in CLIP.

    Raises:
      UserError: an unknown name, a length without room for a token, a vocabulary that cannot be had or is not the
        published one.
    """
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise UserError(f"unknown tokenizer {name!r}, there is {', '.join(names())}; tokenizer; {hint}")
    least = 3 if name == "clip" else 1
    if length < least:
        raise UserError(f"no room for a caption in {length} ids; length of tokenizer {name!r}; use at least {least}")
    if name == "demo":
        encode, decode, _ = _byte_pairs(learn(DEMO_WORDS), words=_gpt2_words())
        return Tokenizer(name, DEMO_SIZE, length, _cleaned(_spaced, encode), lambda ids: decode(ids).lstrip())
    if name == "glide":
        encode, decode, known = _byte_pairs(_published(name, vocab), words=_gpt2_words(), special=("<|endoftext|>",))
        return Tokenizer(name, known, length, _cleaned(str.lower, encode), decode)
    special = ("<|startoftext|>", "<|endoftext|>")
    encode, decode, known = _byte_pairs(_published(name, vocab), words=_clip_words(), special=special, ends=True)
    marks = (known - 2, known - 1)
    return Tokenizer(name, known, length, _cleaned(_clip_clean, encode), lambda ids: decode(ids).strip(), marks)


# ---- byte pair encoding ----


def _byte_pairs(merges: Sequence[Pair], *, words: re.Pattern, special: Sequence[str] = (), ends: bool = False):
    """Byte pair encoding: each word's bytes, joined pair by pair, the pair of the earliest merge first.

    Args:
      merges: pairs of symbols in the order of their use; a symbol is a string of `_byte_symbols`.
      words: finds the words of a text.
      special: words with an id of their own, the last ids. Found in a text they are used only if `words` finds them.
      ends: whether the last byte of a word is another symbol, which ends in '</w>' (CLIP).

    Returns:
      encode: text -> iterator of ids; decode: ids -> text; and the number of ids.
    """
    symbols = _byte_symbols()
    alphabet = [symbols[byte] for byte in _byte_order()]
    of_byte = {byte: number for number, byte in enumerate(_byte_order())}
    pieces = alphabet + [symbol + "</w>" for symbol in alphabet] * ends
    number = {piece: i for i, piece in enumerate(pieces)}
    joined = {}
    for left, right in merges:
        joined[number[left], number[right]] = number[left + right] = len(pieces)
        pieces.append(left + right)
    specials = {word: len(pieces) + i for i, word in enumerate(special)}
    never = len(pieces)
    known = len(pieces) + len(special)
    back = {symbol: bytes([byte]) for byte, symbol in symbols.items()} | {"</w>": b" "}
    spelled = [b"".join(map(back.get, re.findall("</w>$|.", piece) if ends else piece)) for piece in pieces]

    @functools.lru_cache(maxsize=2**16)
    def ids(word: str) -> tuple[int, ...]:
        if word in specials:
            return (specials[word],)
        found = [of_byte[byte] for byte in word.encode()]
        if ends:
            found[-1] += len(alphabet)
        while len(found) > 1:
            # merges are numbered in their order, so the earliest has the lowest id
            pair = min(itertools.pairwise(found), key=lambda pair: joined.get(pair, never))
            if pair not in joined:
                break
            found = _join(found, pair, joined[pair])
        return tuple(found)

    def encode(text: str) -> Iterator[int]:
        return itertools.chain.from_iterable(ids(match.group()) for match in words.finditer(text))

    def decode(tokens: Iterable[int]) -> str:
        tokens = [int(token) for token in tokens]
        for token in tokens:
            if not PADDING <= token < known:
                raise UserError(f"no such token {token}; ids to decode; they are 0 to {known - 1}, or -1 for padding")
        return b"".join(spelled[token] for token in tokens if 0 <= token < len(pieces)).decode("utf-8", "replace")

    return encode, decode, known


def _join(ids: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    """The ids with every `pair`, from the left, replaced by `new`."""
    out: list[int] = []
    last = None
    for token in ids:
        if (last, token) == pair:
            out[-1], last = new, None
        else:
            out.append(token)
            last = token
    return out


def _byte_order() -> list[int]:
    """Bytes in the order of their ids: those that Latin-1 prints, then the others (GPT-2)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printed + sorted(set(range(256)) - set(printed))


@functools.cache
def _byte_symbols() -> dict[int, str]:
    """Byte -> the printed character that stands for it in a file of merges; a blank is U+0120 (GPT-2)."""
    order = _byte_order()
    return {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(order)}


def learn(words: Sequence[str]) -> list[Pair]:
    """Merges until every word is one symbol, the most frequent pair first and of equal ones the first in the alphabet.

    Args:
      words: each counts once for every time it is there, and is taken with the blank before it.
    """
    symbols = _byte_symbols()
    spelled = [[symbols[byte] for byte in f" {word}".encode()] for word in words]
    merges = []
    while counts := collections.Counter(pair for word in spelled for pair in itertools.pairwise(word)):
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        spelled = [_join(word, pair, "".join(pair)) for word in spelled]
        merges.append(pair)
    return merges


# The words of the captions of `shapes` and of the class names of the other embedded data. Ids follow from this list: a
# word added changes them, and a trained model with them.
DEMO_WORDS = (
    "a an the of on in at and with photo picture drawing "
    "small large red orange yellow green cyan blue purple pink black grey white background "
    "circle square triangle diamond cross ring left right above below top bottom middle "
    "temple flower digit number zero one two three four five six seven eight nine "
    "airplane automobile bird cat deer dog frog horse ship truck"
).split()
DEMO_SIZE = 512
# Ids of each, to build a network without its vocabulary.
VOCAB_SIZES = {"glide": 50257, "clip": 49408, "demo": DEMO_SIZE}


# ---- words and their cleaning ----


@functools.cache
def _classes() -> tuple[str, str, str, str]:
    r"""What matches one character of \p{L}, \p{N}, \s (White_Space) and none of these, in the language of `re`."""
    numbers = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
    # \w is L, N and '_'; \d is Nd; \s also holds four separators, which are no White_Space
    return rf"[^\W\d_{numbers}]", rf"[\d{numbers}]", r"[^\S\x1c-\x1f]", r"(?:[^\w\s]|[_\x1c-\x1f])"


@functools.cache
def _gpt2_words() -> re.Pattern:
    """Words with the blank before them; letters, numbers, others; a run of blanks without its last (GPT-2)."""
    letter, number, space, other = _classes()
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?{other}+|{space}+(?={space}|\Z)|{space}+")


@functools.cache
def _clip_words() -> re.Pattern:
    """Words without blanks; every number alone (CLIP)."""
    letter, number, _, other = _classes()
    return re.compile(
        rf"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|{letter}+|{number}|{other}+", re.IGNORECASE
    )


def _cleaned(clean: Callable[[str], str], encode: Callable[[str], Iterator[int]]) -> Callable[[str], Iterator[int]]:
    """`encode` of cleaned text, in which U+FFFD stands for a lone surrogate, as no UTF-8 can hold one."""
    return lambda text: encode(clean(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")))


def _spaced(text: str) -> str:
    """One blank before every word, the first too, so that a word has the same id wherever it stands."""
    return "".join(f" {word}" for word in text.lower().split())


def _clip_clean(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    _, _, space, _ = _classes()
    return re.sub(f"{space}+", " ", text).strip().lower()


_warned: set[str] = set()


def _warn_once(kind: str, line: str):
    """Warns, but once in a process of each kind."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning("%s", line)


# ---- published vocabularies ----


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A published file of merges.

    Attributes:
      url: where it is published.
      sha256: of the file, decompressed.
      merges: how many of its merges are used, from the second line on.
    """

    url: str
    sha256: str
    merges: int

    @property
    def file_name(self) -> str:
        """Without .gz."""
        return self.url.rsplit("/", 1)[-1].removesuffix(".gz")


PUBLISHED = {
    "glide": Vocabulary(
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        50_000,
    ),
    "clip": Vocabulary(
        "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
        "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8",
        48_894,
    ),
}


def _published(name: str, vocab: str) -> list[Pair]:
    """The merges of a published vocabulary."""
    vocabulary = PUBLISHED[name]
    given = vocab or os.environ.get("DIFFAX_VOCAB", "")
    if given:
        path = _find(vocabulary, pathlib.Path(given).expanduser())
        if path is None:
            raise UserError(
                f"no {vocabulary.file_name} or {vocabulary.file_name}.gz; {'vocab' if vocab else 'DIFFAX_VOCAB'}="
                f"{given!r}; give the folder that holds it, from {vocabulary.url}"
            )
    else:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffax"
        path = _find(vocabulary, cache) or fetch(vocabulary, cache)
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE)
    except OSError as error:
        raise UserError(f"cannot read a vocabulary ({error.strerror}); {path}; check the path") from error
    lines = _content(vocabulary, data, path).decode().split("\n")
    return [tuple(line.split()) for line in lines[1 : vocabulary.merges + 1]]


def _find(vocabulary: Vocabulary, place: pathlib.Path) -> pathlib.Path | None:
    files = [place, place / vocabulary.file_name, place / (vocabulary.file_name + ".gz")]
    return next((file for file in files if file.is_file()), None)


def _content(vocabulary: Vocabulary, data: bytes, where: pathlib.Path | str) -> bytes:
    """What the bytes of a file hold, decompressed and checked."""
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_LARGEST_FILE)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"damaged vocabulary ({error}); {where}; fetch it again from {vocabulary.url}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != vocabulary.sha256:
        raise UserError(
            f"not the published {vocabulary.file_name}: SHA-256 of its content is {found}, expected "
            f"{vocabulary.sha256}; {where}; fetch it from {vocabulary.url}"
        )
    return data


def fetch(vocabulary: Vocabulary, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a vocabulary into a folder, checks it, and only then gives it its name.

    Returns:
      The path of the file, which is not compressed.

    Raises:
      UserError: it cannot be had or kept, or is not the published one.
    """
    path = folder / vocabulary.file_name
    part = folder / f".{vocabulary.file_name}.{os.getpid()}.part"
    try:
        with urllib.request.urlopen(vocabulary.url, timeout=60) as reply:
            data = _content(vocabulary, reply.read(_LARGEST_FILE), vocabulary.url)
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot fetch {vocabulary.file_name} into {folder} ({error}); {vocabulary.url}; download it by hand and "
            "name its folder as vocab or in the environment variable DIFFAX_VOCAB"
        ) from error
    print(f"downloaded {vocabulary.url} to {path}", file=sys.stderr, flush=True)
    return path
