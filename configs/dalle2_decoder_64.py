"""The decoder of DALL-E 2: 64x64 pictures from an image embedding and a caption (Ramesh et al. 2022, arXiv:2204.06125).

Section 2.1 and table 3. It is the 3.5 billion parameter base model of GLIDE (configs/glide_base_64.py:paper) with the
image embedding added to the timestep embedding, and as four more tokens to attend to. 3,565,435,398 parameters. The
image embedding is dropped for 10 % of the examples and the caption for 50 %, independently.

FID on MS-COCO at 256x256 of the whole system, 30,000 captions, 250 steps, scale 1.25: 10.39 (GLIDE 12.24).

Data: a folder of pictures with captions, data/captions below the current one, or --config.decoder.data.path=FOLDER; of
      256 pixels, as its CLIP reads them too.
Cost: 800,000 steps of 2048 pictures.
Command: python -m diffax.main --config=configs/dalle2_decoder_64.py --config.clip.workdir=runs/dalle2_clip
Variations of a picture: sample_fn = diffax.load('runs/dalle2_decoder_64')
                         sample_fn(0, 9, image_embedding=sample_fn.embed(picture), prompt='')
The whole system: configs/dalle2.py
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = new("dalle2_decoder_64", stages=("decoder",))
    stage = config.decoder
    stage.shape = (64, 64, 3)
    stage.conditions = each("condition", "text", "image_embedding")
    stage.conditions.text.tokenizer.length = 256
    stage.conditions.text.update(width=2048, layers=24, heads=32, dropout=0.5)
    stage.conditions.image_embedding.update(clip="clip", tokens=4, width=2048)
    stage.data = spec("data", "captions", path="data/captions")
    stage.net.update(channels=512, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.1)
    stage.net.update(attention=(2, 4, 8), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "cosine", num_timesteps=1000)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.condition_dropout = 0.1
    stage.guidance = each("guidance", "classifier_free", "clip_denoised")
    stage.guidance.classifier_free.scale = 1.25
    stage.steps = "250"
    stage.train.update(num_train_steps=800_000, batch_size=2048, learning_rate=1.2e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    if is_tiny:
        tiny(config, "captioned_shapes")
        stage.net.update(channels=32, channel_mult=(1, 2, 2), attention=(2, 4), head_channels=16, remat="none")
        stage.predicts = "v"  # as the stages that enlarge, which do not learn their condition from eps in minutes
        stage.train.update(
            num_train_steps=6000, batch_size=32, learning_rate=2e-3, anneal="cosine", grad_clip=1.0, ema=(0.998,)
        )
    add_section(config, "clip", load("dalle2_clip:tiny" if is_tiny else "dalle2_clip").clip)
    config.eval.num = config.eval.bpd_num = 0  # its captions are scored with the whole system's
    return config
