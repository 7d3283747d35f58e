"""Captions to ids: the published numbers, byte pair encoding against its textbook form, and any string at all."""

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import pathlib
import random
import socketserver
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from diffax.conditions import tokenizer
from diffax.data import archives
from diffax.errors import UserError
from examples.shapes import data as shapes

HEADER = "#version: 0.2\n"
# Of a tiny CLIP, with 'cat', 'cats' and 'it' whole.
MERGES = ["c a", "ca t</w>", "ca t", "cat s</w>", "i t</w>"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Every test warns anew, and finds no vocabulary but its own."""
    monkeypatch.setattr(tokenizer, "_warned", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def merges_file(merges) -> bytes:
    return (HEADER + "\n".join(merges) + "\n").encode()


def publish(monkeypatch, name, content, *, url="http://127.0.0.1:1/merges.txt.gz", merges=None):
    """Makes other merges the published ones."""
    count = content.count(b"\n") - 1 if merges is None else merges
    vocabulary = tokenizer.Vocabulary(url, hashlib.sha256(content).hexdigest(), count)
    monkeypatch.setitem(tokenizer.PUBLISHED, name, vocabulary)
    return vocabulary


@pytest.fixture
def vocab(monkeypatch, tmp_path):
    """A folder with small vocabularies in place of both published ones."""
    learned = merges_file([" ".join(pair) for pair in tokenizer.learn(tokenizer.DEMO_WORDS)])
    for name, content in (("glide", learned), ("clip", merges_file(MERGES))):
        publish(monkeypatch, name, content, url=f"http://127.0.0.1:1/{name}.txt")
        (tmp_path / f"{name}.txt").write_bytes(content)
    return str(tmp_path)


# ---- byte pair encoding ----


def textbook(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte pair encoding as it is defined: for each merge in its order, join wherever its pair stands."""
    symbols = tokenizer._byte_symbols()
    parts = [symbols[byte] for byte in word.encode()]
    for left, right in merges:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == (left, right):
                parts[i : i + 2] = [left + right]
            i += 1
    return parts


def any_text(rng: random.Random) -> str:
    ranges = [(32, 127), (32, 127), (0, 256), (0x250, 0x700), (0x2000, 0x2200), (0x3000, 0x5000), (0xD800, 0xE000),
              (0x1D400, 0x1D800), (0x1F300, 0x1FA00)]  # fmt: skip
    out = []
    for _ in range(rng.randrange(6)):
        low, high = rng.choice(ranges)
        out += [chr(rng.randrange(low, high)) for _ in range(rng.randrange(12))]
        out.append(rng.choice([" ", "  ", "\n", "'s", "'LL", "<|endoftext|>", "&amp;amp;", " a small red circle"]))
    return "".join(out)


def test_ids_are_those_of_textbook_byte_pair_encoding(vocab):
    """Random merges of two letters, with pairs that overlap and that no word ever reaches."""
    rng = random.Random(0)
    pieces, merges = ["a", "b", "\u0120"], []
    while len(merges) < 40:
        pair = rng.choice(pieces), rng.choice(pieces)
        if "".join(pair) not in pieces:
            merges.append(pair)
            pieces.append("".join(pair))
    encode, decode, known = tokenizer._byte_pairs(merges, words=tokenizer._gpt2_words())
    assert known == 256 + 40
    number = {symbol: i for i, symbol in enumerate(map(tokenizer._byte_symbols().get, tokenizer._byte_order()))}
    number |= {"".join(pair): 256 + i for i, pair in enumerate(merges)}
    for _ in range(300):
        word = " " + "".join(rng.choices("ab", k=rng.randrange(1, 30)))
        assert list(encode(word)) == [number[part] for part in textbook(word, merges)]
        assert decode(encode(word)) == word


def test_bytes_are_numbered_as_latin_1_prints_them():
    symbols = tokenizer._byte_symbols()
    assert sorted(symbols) == list(range(256)) and len(set(symbols.values())) == 256
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in symbols.values())
    assert [symbols[ord(c)] for c in "a~ \n\xad"] == ["a", "~", "Ġ", "Ċ", "Ń"]
    assert tokenizer._byte_order()[:2] == [ord("!"), ord('"')] and tokenizer._byte_order()[-1] == 0xAD


def test_every_character_is_a_letter_a_number_a_blank_or_another():
    patterns = [tokenizer.re.compile(pattern) for pattern in tokenizer._classes()]
    blanks = {*map(chr, [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]),
              "\u205f", "\u3000"}  # fmt: skip
    for character in map(chr, [*range(0x3400), *range(0xF900, 0x10200), *range(0x1D400, 0x1F200)]):
        kind = 2 if character in blanks else {"L": 0, "N": 1}.get(unicodedata.category(character)[0], 3)
        assert [bool(p.fullmatch(character)) for p in patterns] == [k == kind for k in range(4)], hex(ord(character))


@pytest.mark.parametrize(
    "text, words",
    [
        ("an oil  painting", ["an", " oil", " ", " painting"]),
        ("it's 2021!  two", ["it", "'s", " 2021", "!", " ", " two"]),
        ("end \n", ["end", " \n"]),
        ("a_b x²½ٮ", ["a", "_", "b", " x", "²½", "ٮ"]),
        (" \x1c1", [" \x1c", "1"]),
    ],
)
def test_words_of_gpt_2(text, words):
    assert tokenizer._gpt2_words().findall(text) == words


def test_words_of_clip():
    text = "it'S 2021! a_b <|endoftext|>x <|start"
    assert tokenizer._clip_words().findall(text) == [
        "it", "'S", "2", "0", "2", "1", "!", "a", "_", "b", "<|endoftext|>", "x", "<|", "start",
    ]  # fmt: skip


def test_text_comes_back_from_its_ids(vocab):
    """Byte-level: no text is lost but for its case, whatever merges there are."""
    glide, rng = tokenizer.build("glide", vocab=vocab, length=8), random.Random(1)
    for text in [any_text(rng) for _ in range(500)]:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").lower()
        assert glide.decode(glide.encode(text)) == whole


# ---- GLIDE's and CLIP's rules, on small vocabularies ----


def test_glide_neither_marks_nor_strips(vocab):
    glide = tokenizer.build("glide", vocab=vocab, length=4)
    ids = glide(["", "  A", "abcdefg", "a"])
    assert ids.dtype == np.int32 and ids.shape == (4, 4)
    letters = [64, 65, 66, 67, 68, 69, 70]  # 'a' to 'g' without a blank before
    a = next(glide.encode(" a"))
    assert ids.tolist() == [[-1] * 4, [220, a, -1, -1], letters[:4], [64, -1, -1, -1]]
    assert glide.marks == () and list(glide.encode("<|endoftext|>"))[-1] != glide.vocab_size - 1
    assert glide.decode(glide(["abcdefg"])[0]) == "abcd"


def test_clip_by_hand(vocab):
    clip = tokenizer.build("clip", vocab=vocab, length=7)
    assert clip.vocab_size == 512 + 5 + 2 and clip.marks == (517, 518)
    ca, cat_, cat, cats_, it_ = range(512, 517)
    s_, slash = 256 + ord("s") - 33, 256 + ord("/") - 33
    rows = {
        "": [517, 518],
        " Cat \n cats ": [517, cat_, cats_, 518],
        "it's": [517, it_, 6, s_, 518],  # "'" and 's</w>'
        "ca": [517, ca - 512 + 66, 256 + 64, 518],  # 'ca' alone ends in another symbol: 'c', 'a</w>'
        "catca": [517, cat, 66, 256 + 64, 518],
        "&amp;#99;at / <|endoftext|>": [517, cat_, slash, 518, 518],
        "cat " * 9: [517, *[cat_] * 5, 518],  # cut before its end
    }
    want = [row + [-1] * (7 - len(row)) for row in rows.values()]
    assert clip(list(rows)).tolist() == want
    assert clip.decode(clip(["cat CATS"])[0]) == "cat cats"


def test_unicode_is_repaired(vocab, caplog):
    clip = tokenizer.build("clip", vocab=vocab, length=77)
    same = ["caf\u00c3\u00a9", "cafe\u0301", "it\u2019s \u201cit\u201d"]
    np.testing.assert_array_equal(clip(same), clip(["caf\u00e9", "caf\u00e9", 'it\'s "it"']))
    assert not caplog.records


# ---- the embedded vocabulary ----


def test_words_of_the_embedded_data_are_one_id_each():
    demo = tokenizer.build("demo", length=32)
    names = [*shapes.COLOURS, *shapes.SHAPES, *shapes.SIZES, *shapes.BACKGROUNDS, *archives.CIFAR10_CLASSES]
    names += ["temple", "flower", "a", "at", "the"] + " ".join(shapes.RELATIONS + shapes.PLACES).split()
    assert set(names) <= set(tokenizer.DEMO_WORDS)
    assert len(set(tokenizer.DEMO_WORDS)) == len(tokenizer.DEMO_WORDS)
    ids = [list(demo.encode(word)) for word in tokenizer.DEMO_WORDS]
    assert all(len(found) == 1 for found in ids) and len({found[0] for found in ids}) == len(ids)
    assert max(found[0] for found in ids) < demo.vocab_size == 512
    for scene in map(shapes.scene, range(50)):
        row = demo([scene.caption])[0]
        assert (row >= 0).sum() == len(scene.caption.split()) and demo.decode(row) == scene.caption


def test_ids_of_the_embedded_vocabulary_stay():
    """Models are trained on them."""
    demo = tokenizer.build("demo", length=12)
    merges = json.dumps(tokenizer.learn(tokenizer.DEMO_WORDS)).encode()
    assert hashlib.sha256(merges).hexdigest() == "a06f91d510d7c84dbd6af3f636a0e80375a1362a9dd4cd7fb0dd601d18805c97"
    assert demo(["A small red circle\tleft of a  large blue square", "", "\n", "é!"]).tolist() == [
        [257, 444, 400, 416, 398, 432, 257, 397, 414, 445, -1, -1],
        [-1] * 12,
        [-1] * 12,
        [220, 127, 102, 0] + [-1] * 8,
    ]


def test_learned_merges_by_hand():
    """' ab ab ac': ' a' three times, then 'Ġab' twice, then 'Ġac'; of ' b a' alone the first in the alphabet."""
    assert tokenizer.learn(["ab", "ab", "ac"]) == [("Ġ", "a"), ("Ġa", "b"), ("Ġa", "c")]
    assert tokenizer.learn(["ba"]) == [("b", "a"), ("Ġ", "ba")]
    assert tokenizer.learn([]) == []


# ---- any caption ----


@pytest.mark.parametrize("name", ["glide", "clip", "demo"])
def test_any_string_has_ids_of_the_same_shape(vocab, name, caplog):
    tokenize, rng = tokenizer.build(name, vocab=vocab, length=10), random.Random(2)
    texts = [any_text(rng) for _ in range(500)]
    texts += ["", "\0", "\ud800", "\udc00\ud83d", "\x1b[31m", "a" * 2**21, " " * 2**21, "\u4e00" * 2**21, "é" * 2**21]
    ids = tokenize(texts)
    assert ids.shape == (len(texts), 10) and ids.dtype == np.int32
    assert ids.min() == -1 and ids.max() < tokenize.vocab_size
    padded = ids == -1
    assert (padded[:, 1:] >= padded[:, :-1]).all(), "padding is behind"
    assert all(isinstance(tokenize.decode(row), str) for row in ids)
    np.testing.assert_array_equal(tokenize(texts[:7]), ids[:7])
    assert tokenize([]).shape == (0, 10)
    cut = [record for record in caplog.records if "was cut" in record.getMessage()]
    assert len(cut) == 1 and cut[0].levelno == logging.WARNING


def test_only_what_is_cut_is_told_of(caplog):
    demo = tokenizer.build("demo", length=3)
    demo(["a small ring", "a"])
    assert not caplog.records
    demo(["a small red ring"]), demo(["a small red ring"]), tokenizer.build("demo", length=2)(["a small ring"])
    assert [r.getMessage() for r in caplog.records] == [
        "a caption of more than 3 tokens was cut, as later ones will be: 'a small red ring'"
    ]


@pytest.mark.parametrize(
    "captions, text",
    [
        ([None], "a caption is text, got NoneType; caption 0 of 1"),
        (["a", b"b"], "got bytes; caption 1 of 2"),
        ([np.int32(3)], "got int32"),
        ("a ring", r"one caption where a list is expected; 'a ring'; write \[caption\]"),
    ],
)
def test_what_is_no_list_of_strings_is_refused(captions, text):
    with pytest.raises(UserError, match=text):
        tokenizer.build("demo", length=4)(captions)


@pytest.mark.parametrize("name, token", [("demo", -2), ("demo", 512), ("glide", 10**6)])
def test_ids_that_do_not_exist_are_refused(vocab, name, token):
    with pytest.raises(UserError, match=f"no such token {token}; ids to decode; they are 0 to "):
        tokenizer.build(name, vocab=vocab, length=4).decode([token])


def test_threads_tokenize_alike(vocab):
    glide, rng = tokenizer.build("glide", vocab=vocab, length=16), random.Random(3)
    texts = [any_text(rng) for _ in range(200)]
    want, got = tokenizer.build("glide", vocab=vocab, length=16)(texts), {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: glide(texts)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_array_equal(got[i], want)


# ---- vocabularies ----


@pytest.mark.parametrize(
    "name, length, text",
    [
        ("clop", 77, "unknown tokenizer 'clop', there is glide, clip, demo; tokenizer; did you mean 'clip'?"),
        (None, 77, "unknown tokenizer None.*choose one of them"),
        ("clip", 2, "no room for a caption in 2 ids; length of tokenizer 'clip'; use at least 3"),
        ("demo", 0, "no room for a caption in 0 ids; length of tokenizer 'demo'; use at least 1"),
    ],
)
def test_bad_requests_are_refused(name, length, text):
    with pytest.raises(UserError, match=text):
        tokenizer.build(name, length=length)


def test_published_checksums_are_as_published():
    """Those that users of these files check as well, and the sizes that make 50257 and 49408 ids."""
    glide, clip = tokenizer.PUBLISHED["glide"], tokenizer.PUBLISHED["clip"]
    assert glide.sha256.startswith("1ce1664773c50f3e") and clip.sha256.startswith("67603cfda2e032ad")
    sizes = {"glide": 256 + glide.merges + 1, "clip": 512 + clip.merges + 2, "demo": 512}
    assert sizes == tokenizer.VOCAB_SIZES and sizes["glide"] == 50257 and sizes["clip"] == 49408
    assert [glide.file_name, clip.file_name] == ["vocab.bpe", "bpe_simple_vocab_16e6.txt"]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("place", ["folder", "file", "environment", "cache"])
def test_vocabularies_are_found(monkeypatch, tmp_path, place, compressed):
    content = merges_file(MERGES)
    publish(monkeypatch, "clip", content)
    folder = tmp_path / ("cache/diffax" if place == "cache" else "here")
    folder.mkdir(parents=True)
    file = folder / ("merges.txt.gz" if compressed else "merges.txt")
    file.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    monkeypatch.setenv("DIFFAX_VOCAB", str(folder) if place == "environment" else "")
    vocab = {"folder": str(folder), "file": str(file)}.get(place, "")
    assert tokenizer.build("clip", vocab=vocab, length=4)(["cats"]).tolist() == [[517, 515, 518, -1]]


def test_rest_of_a_file_of_merges_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "merges.txt").write_bytes(merges_file(MERGES))
    publish(monkeypatch, "clip", merges_file(MERGES), merges=2)
    clip = tokenizer.build("clip", vocab=str(tmp_path), length=9)
    assert clip.vocab_size == 512 + 2 + 2 and len(list(clip.encode("cats"))) == 3


@pytest.mark.parametrize(
    "content, text",
    [
        (None, "no merges.txt or merges.txt.gz; vocab='.*'; give the folder that holds it, from http://127.0.0.1:1/"),
        (b"", "not the published merges.txt: SHA-256 of its content is e3b0c44298fc1c14.*; .*merges.txt; fetch it"),
        (merges_file(MERGES[:-1]), "not the published merges.txt"),
        (
            gzip.compress(merges_file(MERGES), mtime=0)[:-12],
            "damaged vocabulary .*; .*merges.txt; fetch it again from http://",
        ),
        (b"\x1f\x8b\0\0", "damaged vocabulary"),
        (gzip.compress(b"other", mtime=0), "not the published merges.txt"),
    ],
)
def test_other_vocabularies_are_refused(monkeypatch, tmp_path, content, text):
    publish(monkeypatch, "clip", merges_file(MERGES))
    if content is not None:
        (tmp_path / "merges.txt").write_bytes(content)
    with pytest.raises(UserError, match=text) as caught:
        tokenizer.build("clip", vocab=str(tmp_path), length=9)
    assert "\n" not in str(caught.value)


def test_folder_of_the_environment_is_named_where_it_lacks_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFAX_VOCAB", str(tmp_path))
    with pytest.raises(UserError, match=f"no vocab.bpe or vocab.bpe.gz; DIFFAX_VOCAB='{tmp_path}'"):
        tokenizer.build("glide", length=9)


# ---- downloading ----


@pytest.fixture
def server():
    """A server of one file, `server.content`, that counts how often it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *args):
            pass

    server = socketserver.TCPServer(("127.0.0.1", 0), Handler)  # HTTPServer would look up its own name
    server.content, server.asked = gzip.compress(merges_file(MERGES), mtime=0), 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}/merges.txt.gz"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_vocabulary_is_downloaded_once(server, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DIFFAX_VOCAB", raising=False)
    publish(monkeypatch, "clip", merges_file(MERGES), url=server.url)
    for _ in range(2):
        assert tokenizer.build("clip", length=4)(["cats"]).tolist() == [[517, 515, 518, -1]]
    folder = tmp_path / "cache" / "diffax"
    assert server.asked == 1 and os.listdir(folder) == ["merges.txt"]
    assert (folder / "merges.txt").read_bytes() == merges_file(MERGES)
    assert capsys.readouterr().err == f"downloaded {server.url} to {folder / 'merges.txt'}\n"


@pytest.mark.parametrize("fault", ["other content", "broken off", "no server", "no folder"])
def test_download_that_fails_leaves_nothing(server, monkeypatch, tmp_path, fault):
    vocabulary = tokenizer.Vocabulary(server.url, hashlib.sha256(merges_file(MERGES)).hexdigest(), 5)
    folder, text = tmp_path / "kept", f"cannot fetch merges.txt into {tmp_path / 'kept'} .*DIFFAX_VOCAB"
    if fault == "other content":
        server.content, text = b"<html>", f"not the published merges.txt.*; {server.url}; "
    elif fault == "broken off":
        server.content, text = server.content[:-9], f"damaged vocabulary .*; {server.url}; fetch it again"
    elif fault == "no server":
        vocabulary = dataclasses.replace(vocabulary, url="http://127.0.0.1:1/merges.txt")
    else:
        folder.write_bytes(b"")
    with pytest.raises(UserError, match=text) as caught:
        tokenizer.fetch(vocabulary, folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in pathlib.Path(tmp_path).iterdir()] == (["kept"] if fault == "no folder" else [])
