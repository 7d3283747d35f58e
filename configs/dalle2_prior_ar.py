"""The autoregressive prior of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125, section 2.2 and table 3).

It writes an embedding as 319 codes, of its first principal components, each in one of 1,024 buckets. A causal
transformer, width 1664, 24 blocks, 26 heads, reads the caption through a text encoder of its own (256 tokens, width
2048, 24 blocks, 32 heads), the CLIP text embedding, and how well the picture is to fit the caption: sampling draws that
from the upper half of the training data's values. 2,285,749,120 parameters, of which the text encoder has 1,316
million; the paper says 1 billion. It leaves open how the caption enters (here as keys and values of every block), where
the buckets lie (here at quantiles) and the scale of guidance (here 1).

FID on MS-COCO at 256x256 of the whole system, 30,000 captions, decoder's scale 1.25: 10.63 (diffusion prior: 10.39).

Data: a folder of pictures with captions, data/captions below the current one, or --config.prior.data.path=FOLDER.
Cost: 1,000,000 steps of 4096 pairs.
Command: python -m diffax.main --config=configs/dalle2_prior_ar.py --config.clip.workdir=runs/dalle2_clip
The whole system: configs/dalle2.py:ar
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "embeddings of 16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = new("dalle2_prior_ar", stages=("prior",), model="code_prior")
    stage = config.prior
    stage.shape = (1024,)
    stage.clip = "clip"
    stage.conditions = each("condition", "text", "text_embedding")
    stage.conditions.text.tokenizer.length = 256
    stage.conditions.text.update(width=2048, layers=24, heads=32)
    stage.conditions.text_embedding.update(clip="clip", enters="token", width=2048)
    stage.data = spec("data", "captions", path="data/captions")
    stage.net.update(width=1664, layers=24, heads=26, remat="blocks")
    stage.codes.update(components=319, buckets=1024, percentile=50.0)
    stage.condition_dropout = 0.1
    stage.guidance = each("guidance", "classifier_free")
    stage.guidance.classifier_free.scale = 1.0
    stage.train.update(num_train_steps=1_000_000, batch_size=4096, learning_rate=1.6e-4, warmup_steps=0, grad_clip=0.0)
    stage.train.update(optimizer=spec("optimizer", "adamw", weight_decay=0.04, b2=0.91, eps=1e-10), ema=(0.999,))
    config.eval.num = config.eval.bpd_num = 0
    if is_tiny:
        tiny(config, "captioned_shapes")
        stage.shape = (32,)
        stage.net.remat = "none"
        stage.net.update(width=128, layers=4, heads=4)
        stage.codes.update(components=16, buckets=64, examples=5000)
        stage.train.update(
            num_train_steps=3000, batch_size=64, anneal="cosine", grad_clip=1.0, ema=(0.998,), sample_every=0
        )
    add_section(config, "clip", load("dalle2_clip:tiny" if is_tiny else "dalle2_clip").clip)
    config.eval.num = config.eval.bpd_num = 0
    return config
