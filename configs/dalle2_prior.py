"""The diffusion prior of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125, section 2.2 and table 3).

A causal transformer, width 2048, 24 blocks, 32 heads, that reads the caption (256 tokens of its own), the CLIP text
embedding, the timestep embedding, the noised image embedding and a query, and predicts the clean embedding. The paper
says 1 billion parameters; these are 1,327 million, of which 103 are the table of tokens.

64 steps with the variance of Analytic-DPM, which is measured when training ends. Of two samples the one nearer to the
caption is kept. The paper finds that guiding the prior harms, so the scale is 1 here.

Data: a folder of pictures with captions, data/captions below the current one, or --config.prior.data.path=FOLDER.
Cost: 600,000 steps of 4096 pairs.
Command: python -m diffax.main --config=configs/dalle2_prior.py --config.clip.workdir=runs/dalle2_clip
The whole system: configs/dalle2.py
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "embeddings of 16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = new("dalle2_prior", stages=("prior",))
    stage = config.prior
    stage.shape = (1024,)
    stage.clip = "clip"
    stage.conditions = each("condition", text="tokens", text_embedding="text_embedding")
    stage.conditions.text.tokenizer = spec("tokenizer", "glide", length=256)
    stage.conditions.text_embedding.update(clip="clip", enters="token")
    stage.data = spec("data", "captions", path="data/captions")
    stage.net = spec("network", "prior", width=2048, layers=24, heads=32, remat="blocks")
    stage.schedule = spec("schedule", "cosine", num_timesteps=1000)
    stage.predicts, stage.variance = "x", "analytic"
    stage.condition_dropout = 0.1
    stage.guidance = each("guidance", "classifier_free")
    stage.guidance.classifier_free.scale = 1.0
    stage.steps, stage.candidates = "64", 2
    stage.train.update(num_train_steps=600_000, batch_size=4096, learning_rate=1.1e-4, warmup_steps=0, grad_clip=0.0)
    stage.train.update(optimizer=spec("optimizer", "adamw", weight_decay=0.06, b2=0.96, eps=1e-6), ema=(0.9999,))
    config.eval.num = config.eval.bpd_num = 0
    if is_tiny:
        tiny(config, "captioned_shapes")
        stage.shape = (32,)
        stage.net.remat = "none"
        stage.net.update(width=128, layers=4, heads=4)
        stage.train.update(
            num_train_steps=3000, batch_size=64, anneal="cosine", grad_clip=1.0, ema=(0.998,), sample_every=0
        )
    add_section(config, "clip", load("dalle2_clip:tiny" if is_tiny else "dalle2_clip").clip)
    config.eval.num = config.eval.bpd_num = 0
    return config
