"""karlo v1.0-alpha: 256x256 pictures from text, DALL-E 2's method with released weights (kakaobrain/karlo).

A prior of 1,022,028,544 parameters, a decoder of 893,318,086 and an upsampler of two networks of 691,579,523 each, of
which `up_last` takes the last of 7 steps; and OpenAI's CLIP ViT-L/14, 427,616,513 parameters, whose embeddings keep
their length. The prior and the decoder read captions by CLIP alone. `clip.embedding.mean` and `std` are the statistics
that were released with the prior, without which it makes nothing sensible.

FID on MS-COCO at 256x256, 30,000 captions, 50 steps of the decoder, scales 4 and 8: 14.43.

Batches and learning rates are not published; those here are of DALL-E 2. `up_last` was fine-tuned with a perceptual and
an adversarial loss, which is not done here.

Data: a folder of pictures with captions, data/captions below the current one, or --config.prior.data.path=FOLDER ...
Cost: 1,000,000 steps of each network.
Command: python -m diffax.main --config=configs/karlo.py --mode=sample --workdir=WEIGHTS --prompt='a corgi in the snow'
"""

from diffax.config import add_section, config_defaults, load, split_variant, tiny

VARIANTS = {"tiny": "32x32 to 64x64 embedded captioned shapes"}


def get_config(variant: str = ""):
    config = config_defaults("karlo", stages=("clip", "prior", "decoder", "up"))
    clip, prior, decoder, up = (config[name] for name in config.stages)
    for stage in (clip, prior, decoder, up):
        stage.data.update(name="captions", path="data/captions")
        stage.schedule.update(name="cosine", steps=1000)
        stage.train.update(steps=1_000_000, batch_size=2048, learning_rate=1.2e-4, warmup_steps=0)
        stage.train.update(optimizer="adamw", clip=0.0, ema=(0.9999,))
    clip.shape, clip.takes = (224, 224, 3), ("text",)
    clip.text.update(tokenizer="clip", length=77)
    clip.net.update(name="clip", features=768, activation="quick_gelu", remat="blocks")
    clip.net.image.update(width=1024, layers=24, heads=16, patch=14, noised=False)
    clip.net.text.update(width=768, layers=12, heads=12)

    prior.shape, prior.takes, prior.clip = (768,), ("text_features", "text_embedding"), "clip"
    prior.net.update(name="prior", remat="blocks")
    prior.net.prior.update(width=2048, layers=20, heads=32)
    prior.predicts, prior.variance, prior.drop = "x", "fixed_small", 0.2
    prior.guidance, prior.guidance_scale = ("classifier_free", "clip_denoised"), 4.0
    prior.limit, prior.steps = 10.0, "25"

    decoder.shape, decoder.clip = (64, 64, 3), "clip"
    decoder.takes = ("image_embedding", "text_embedding", "text_features")
    decoder.net.update(channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.1)
    decoder.net.update(attention=(2, 4, 8), head_channels=64)  # at 32, 16 and 8 pixels
    decoder.net.update(scale_shift=True, resample="biggan", remat="blocks")
    decoder.variance, decoder.loss.name = "learned_range", "hybrid"
    decoder.drop, decoder.drop_text = 0.1, 0.3
    decoder.guidance, decoder.guidance_scale = ("classifier_free", "clip_denoised"), 8.0
    decoder.steps = "50"

    up.shape, up.takes = (256, 256, 3), ("low_res",)
    up.low_res.update(factor=4, crop=64, round=False)
    up.net.update(channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
    up.net.update(attention=(), mid_attention=False, low_res_resize="bicubic", resample="biggan", remat="blocks")
    up.variance, up.steps, up.last = "fixed_small", "7", "up_last"
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.num = config.eval.bpd_num = 0
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "shapes")
        for stage in (clip, prior, decoder, up):
            stage.data.update(single=True, holdout=load("glide_base_64:tiny").base.data.holdout)
            stage.net.remat = "none"
            stage.train.update(steps=3000, batch_size=64, anneal="cosine", clip=1.0, ema=(0.998,))
        clip.shape, prior.shape, decoder.shape, up.shape = (32, 32, 3), (32,), (32, 32, 3), (64, 64, 3)
        clip.net.features = 32
        clip.net.image.update(width=64, layers=3, heads=4, patch=4)
        clip.net.text.update(width=64, layers=2, heads=4)
        clip.train.steps = 2000
        prior.net.prior.update(width=128, layers=4)
        decoder.net.update(channels=16, channel_mult=(1, 2, 4), attention=(4,), head_channels=16)
        decoder.net.clip.sequence_width = 64
        up.low_res.update(factor=2, crop=32)
        up.net.update(channels=16, channel_mult=(1, 2, 2), attention=())
        decoder.predicts = up.predicts = "v"  # as in configs/glide.py:tiny
        decoder.train.update(batch_size=32, learning_rate=2e-3)
        up.train.update(steps=1000, batch_size=32)
        up.steps = "7"
        config.eval.bpd_num = 0
        config.eval.update(num=500, batch_size=100, judge="captions")
    add_section(config, "up_last", up.copy_and_resolve_references()).last = ""
    return config
