"""karlo v1.0-alpha: 256x256 pictures from text, DALL-E 2's method with released weights (kakaobrain/karlo).

A prior of 1,022,028,544 parameters, a decoder of 893,318,086 and an upsampler of two networks of 691,579,523 each, of
which `up_last` takes the last of 7 steps; and OpenAI's CLIP ViT-L/14, 427,616,513 parameters, whose embeddings keep
their length. The prior and the decoder read captions by CLIP alone. `clip.embedding.mean` and `std` are the statistics
that were released with the prior, without which its embeddings are meaningless.

FID on MS-COCO at 256x256, 30,000 captions, 50 steps of the decoder, scales 4 and 8: 14.43.

Batches and learning rates are not published; those here are of DALL-E 2. `up_last` was fine-tuned with a perceptual and
an adversarial loss, which is not done here.

Data: a folder of pictures with captions, data/captions below the current one, or --config.prior.data.path=FOLDER ...
Cost: 1,000,000 steps of each network.
Command: python -m diffax.main --config=configs/karlo.py --mode=sample --workdir=WEIGHTS --prompt='a corgi in the snow'
"""

from diffax.config import add_section, each, new, spec, split_variant
from diffax.configs._tiny import CAPTIONS, tiny

VARIANTS = {"tiny": "32x32 to 64x64 embedded captioned shapes"}


def get_config(variant: str = ""):
    config = new("karlo", stages=("clip", "prior", "decoder", "up"))
    clip, prior, decoder, up = add_section(config, "clip", "clip"), config.prior, config.decoder, config.up
    for stage in (clip, prior, decoder, up):
        stage.data = spec("data", "captions", path="data/captions")
        stage.schedule = spec("schedule", "cosine", num_timesteps=1000)
        stage.train.update(num_train_steps=1_000_000, batch_size=2048, learning_rate=1.2e-4, warmup_steps=0)
        stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    clip.shape, clip.noised = (224, 224, 3), False
    clip.tokenizer = spec("tokenizer", "clip", length=77)
    clip.net.update(features=768, activation="quick_gelu", remat="blocks")
    clip.net.image.update(width=1024, layers=24, heads=16, patch=14)
    clip.net.text.update(width=768, layers=12, heads=12)

    prior.shape, prior.clip = (768,), "clip"
    prior.conditions = each("condition", "text_features", "text_embedding")
    prior.conditions.text_embedding.enters = "token"
    prior.net = spec("network", "prior", width=2048, layers=20, heads=32, remat="blocks")
    prior.predicts, prior.variance, prior.condition_dropout = "x", "fixed_small", 0.2
    prior.guidance = each("guidance", "classifier_free", "clip_denoised")
    prior.guidance.classifier_free.scale, prior.guidance.clip_denoised.clip_range = 4.0, 10.0
    prior.steps = "25"

    decoder.shape = (64, 64, 3)
    decoder.conditions = each("condition", "image_embedding", "text_embedding", "text_features")
    decoder.conditions.image_embedding.update(tokens=4, width=1536)
    decoder.conditions.text_embedding.dropout = 0.3
    decoder.conditions.text_features.update(width=1536, norm=True, dropout=0.3)
    decoder.net.update(channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.1)
    decoder.net.update(attention=(2, 4, 8), head_channels=64)  # at 32, 16 and 8 pixels
    decoder.net.update(scale_shift=True, resample="biggan", remat="blocks")
    decoder.variance, decoder.loss = "learned_range", spec("loss", "hybrid", weight=1.0)
    decoder.condition_dropout = 0.1
    decoder.guidance = each("guidance", "classifier_free", "clip_denoised")
    decoder.guidance.classifier_free.scale, decoder.steps = 8.0, "50"

    up.shape = (256, 256, 3)
    up.conditions = each("condition", "low_res")
    up.conditions.low_res.update(factor=4, crop=64, round=False, resize="bicubic")
    up.net.update(channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
    up.net.update(attention=(), mid_attention=False, resample="biggan", remat="blocks")
    up.variance, up.steps = "fixed_small", "7"
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, bpd_num=0)
    if "tiny" in split_variant(variant, VARIANTS):
        _shrink(config)
    add_section(config, "up_last", up.copy_and_resolve_references())
    up.guidance = each("guidance", "finish_with", "clip_denoised")
    up.guidance.finish_with.section = "up_last"
    return config


def _shrink(config):
    tiny(config, "captioned_shapes")
    clip, prior, decoder, up = (config[name] for name in config.stages)
    for stage in (clip, prior, decoder, up):
        stage.net.remat = "none"
        stage.train.update(num_train_steps=3000, batch_size=64, anneal="cosine", grad_clip=1.0, ema=(0.998,))
    clip.shape, prior.shape, decoder.shape, up.shape = (32, 32, 3), (32,), (32, 32, 3), (64, 64, 3)
    clip.net.features = 32
    clip.net.image.update(width=64, layers=3, heads=4, patch=4)
    clip.train.num_train_steps = 2000
    prior.net.update(width=128, layers=4, heads=4)
    decoder.net.update(channels=16, channel_mult=(1, 2, 4), attention=(4,), head_channels=16)
    up.conditions.low_res.update(factor=2, crop=32)
    up.net.update(channels=16, channel_mult=(1, 2, 2), attention=())
    decoder.predicts = up.predicts = "v"  # as in configs/glide.py:tiny
    decoder.train.update(batch_size=32, learning_rate=2e-3)
    up.train.update(num_train_steps=1000, batch_size=32)
    up.steps = "7"
    config.eval.update(num=500, batch_size=100, bpd_num=0, classifier=spec("evaluation", CAPTIONS))
