"""Runners of the golden cases about tokenizers (kinds by name); DIFFAX_VOCAB names the folder of vocabularies."""

import os

import numpy as np

from diffax.conditions import tokenizer


def ids(name):
    def run(meta, inputs, params):
        if not os.environ.get("DIFFAX_VOCAB"):
            raise NotImplementedError("DIFFAX_VOCAB names no folder of published vocabularies")
        captions, length = meta["config"]["captions"], meta["config"]["text_ctx"]
        tokenize = tokenizer.build(name, length=length)
        tokens = np.asarray(tokenize(captions))
        encoded = [list(tokenize.encode(caption)) for caption in captions]
        if "n_vocab" in meta:
            assert tokenize.vocab_size == meta["n_vocab"]
        if "start_token" in meta:
            assert tokenize.marks == (meta["start_token"], meta["end_token"])
        if "decoded" in meta:
            # the marks that a caption spells out are not shown either
            marks = "<|endoftext|><|startoftext|>" if "start_token" in meta else "no marks"
            shown = [text.replace(marks, "") for text in meta["decoded"]]
            shown = [text.strip() for text in shown] if "start_token" in meta else shown
            assert [tokenize.decode(i) for i in encoded] == shown
        # GPT-2's padding is the end token, CLIP's is 0; here it is -1
        padding = meta["end_token"] if name == "glide" else 0
        return {
            "tokens": np.where(tokens < 0, padding, tokens),
            "mask": tokens >= 0,
            "lens": (tokens >= 0).sum(1),
            "num_ids": [len(i) for i in encoded],
        }

    return run


RUNNERS = {"glide.tokenizer.bpe": ids("glide"), "glide.tokenizer.clip": ids("clip"), "karlo.tokenizer": ids("clip")}
