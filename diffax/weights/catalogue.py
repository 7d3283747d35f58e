"""The files that were published."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffax import config as configs
from diffax.components import spec
from diffax.weights import clip
from diffax.weights.architecture import Architecture
from diffax.weights.families import FAMILIES, HO, named_config, table_of
from diffax.weights.table import Table


class Published(NamedTuple):
    """A file that was published.

    Attributes:
      file: its name.
      place: where it lies: the address of its folder, or the name of a model on the Hugging Face hub, and the folder
        in that.
      family: key of `FAMILIES`.
      parameters: how many numbers it holds.
      config: which config is of it, with the variant; '' if there is none.
      section: which section of that; of a file of several, the first.
      options: of the family's table.
      architecture: the model, where there is no config.
    """

    file: str
    place: str
    family: str
    parameters: int
    config: str = ""
    section: str = "base"
    options: Mapping[str, Any] = {}
    architecture: Callable[[], Architecture] | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return pathlib.Path(self.file).stem

    @property
    def folder(self) -> str:
        """The name of the folder that it lies in."""
        return self.place.rpartition("/")[2]

    @property
    def rest(self) -> str:
        """The folder of the rest of its network, if it holds a part alone."""
        rests = FAMILIES[self.family].rests
        return next((rests[value] for value in self.options.values() if value in rests), "")

    def its_config(self) -> dict[str, Any]:
        """The config that the file's section is of, a plain dict."""
        if self.architecture is None:
            return named_config(self.config)
        return clip_config(self.name if self.place == CLIPS else self.folder, self.architecture())

    def table(self) -> Table:
        """The map between the file's arrays and parameters; a ValueError where its network cannot have one."""
        return table_of(self.family, self.its_config(), self.section, **self.options)


def clip_config(name: str, architecture: Architecture) -> dict[str, Any]:
    """A config of one section, 'clip', the CLIP of an architecture.

    Raises:
      ValueError: it does not fit together.
    """
    config = configs.new(name, stages=())
    config.stages = ("clip",)
    section = configs.add_section(config, "clip", architecture.section)
    section.tokenizer = spec("tokenizer", "clip", length=section.tokenizer.length)
    config.eval.num = 0
    configs.check(config)
    return configs.to_dict(config)


IMPROVED = "https://openaipublic.blob.core.windows.net/diffusion/march-2021"
GUIDED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
GLIDE = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
NEW = {"attention_order": "new"}
UNET, MODEL, UP = "diffusion_pytorch_model.safetensors", "model.safetensors", "up"
CLIPS = "https://openaipublic.azureedge.net/clip/models"
KARLO = "https://arena.kakaocdn.net/brainrepo/models/karlo-public/v1.0.0.alpha"
KARLO_HUB = "kakaobrain/karlo-v1-alpha"
VIT_B_32 = functools.partial(clip.transformers_config, {"vision_config": {"patch_size": 32}})

# Parameters as counted in the networks that the programs build from the flags of their README files.
PUBLISHED = (
    Published("imagenet64_uncond_100M_1500K.pt", IMPROVED, "openai", 121_063_942, "iddpm_imagenet_64"),
    Published("imagenet64_uncond_vlb_100M_1500K.pt", IMPROVED, "openai", 121_063_942, "iddpm_imagenet_64:vlb"),
    Published("imagenet64_cond_270M_250K.pt", IMPROVED, "openai", 273_049_350, "iddpm_imagenet_64:cond"),
    Published("cifar10_uncond_50M_500K.pt", IMPROVED, "openai", 52_546_438, "iddpm_cifar10"),
    Published("cifar10_uncond_vlb_50M_500K.pt", IMPROVED, "openai", 52_546_438, "iddpm_cifar10:vlb"),
    Published("upsample_cond_500K.pt", IMPROVED, "openai", 279_792_390, "iddpm_upsample_64_256", UP),
    Published("lsun_uncond_100M_1200K_bs128.pt", IMPROVED, "openai", 113_676_678, "iddpm_lsun_256"),
    Published("lsun_uncond_100M_2400K_bs64.pt", IMPROVED, "openai", 113_676_678, "iddpm_lsun_256:bs64"),
    Published("64x64_diffusion.pt", GUIDED, "openai", 295_904_454, "adm_imagenet_64", options=NEW),
    Published("128x128_diffusion.pt", GUIDED, "openai", 421_529_606, "adm_imagenet_128"),
    Published("256x256_diffusion.pt", GUIDED, "openai", 553_838_086, "adm_imagenet_256"),
    Published("256x256_diffusion_uncond.pt", GUIDED, "openai", 552_814_086, "adm_imagenet_256_uncond"),
    Published("512x512_diffusion.pt", GUIDED, "openai", 558_997_638, "adm_imagenet_512"),
    Published("lsun_bedroom.pt", GUIDED, "openai", 552_814_086, "adm_lsun_bedroom"),
    Published("lsun_cat.pt", GUIDED, "openai", 552_814_086, "adm_lsun_cat"),
    Published("lsun_horse.pt", GUIDED, "openai", 552_814_086, "adm_lsun_horse"),
    Published("lsun_horse_nodropout.pt", GUIDED, "openai", 552_814_086, "adm_lsun_horse:nodropout"),
    Published("64_256_upsampler.pt", GUIDED, "openai", 311_795_910, "adm_upsample_64_256", UP),
    Published("128_512_upsampler.pt", GUIDED, "openai", 308_835_270, "adm_upsample_128_512", UP),
    Published("64x64_classifier.pt", GUIDED, "openai", 65_438_568, "adm_classifier_64", "classifier"),
    Published("128x128_classifier.pt", GUIDED, "openai", 42_568_040, "adm_classifier_128", "classifier"),
    Published("256x256_classifier.pt", GUIDED, "openai", 54_096_360, "adm_classifier_256", "classifier"),
    Published("512x512_classifier.pt", GUIDED, "openai", 54_448_360, "adm_classifier_512", "classifier"),
    Published("base.pt", GLIDE, "glide", 385_030_726, "glide_base_64"),
    Published("upsample.pt", GLIDE, "glide", 398_361_286, "glide_upsample_256", UP),
    Published("base_inpaint.pt", GLIDE, "glide", 385_037_638, "glide_inpaint_64"),
    Published("upsample_inpaint.pt", GLIDE, "glide", 398_368_198, "glide_inpaint_256", UP),
    Published("clip_image_enc.pt", GLIDE, "glide-clip", 86_443_776, "glide_clip", "clip", {"tower": "image"}),
    Published("clip_text_enc.pt", GLIDE, "glide-clip", 71_679_488, "glide_clip", "clip", {"tower": "text"}),
    Published("ViT-B-32.pt", CLIPS, "openai-clip", 151_277_313, section="clip", architecture=VIT_B_32),
    Published("ViT-B-16.pt", CLIPS, "openai-clip", 149_620_737, "clip_vit_b16", "clip"),
    Published("ViT-L-14.pt", CLIPS, "openai-clip", 427_616_513, "karlo", "clip"),
    Published(
        MODEL, "openai/clip-vit-base-patch32", "transformers", 151_277_313, section="clip", architecture=VIT_B_32
    ),
    Published(MODEL, "openai/clip-vit-base-patch16", "transformers", 149_620_737, "clip_vit_b16", "clip"),
    Published(MODEL, "openai/clip-vit-large-patch14", "transformers", 427_616_513, "karlo", "clip"),
    Published("prior-ckpt-step=01000000-of-01000000.ckpt", KARLO, "karlo", 1_022_028_544, "karlo", "prior"),
    Published("decoder-ckpt-step=01000000-of-01000000.ckpt", KARLO, "karlo", 893_318_086, "karlo", "decoder"),
    Published("improved-sr-ckpt-step=1.2M.ckpt", KARLO, "karlo-upsampler", 1_383_159_046, "karlo", UP),
    Published("ViT-L-14_stats.th", KARLO, "karlo-stats", 1_536, "karlo", "clip"),
    Published(UNET, f"{KARLO_HUB}/prior", "diffusers-prior", 1_022_030_080, "karlo", "prior"),
    Published(UNET, f"{KARLO_HUB}/decoder", "diffusers-decoder", 885_439_686, "karlo", "decoder", {"part": "decoder"}),
    Published(
        UNET, f"{KARLO_HUB}/text_proj", "diffusers-decoder", 7_878_400, "karlo", "decoder", {"part": "text_proj"}
    ),
    Published(UNET, f"{KARLO_HUB}/super_res_first", "diffusers-upsampler", 691_579_523, "karlo", UP),
    Published(UNET, f"{KARLO_HUB}/super_res_last", "diffusers-upsampler", 691_579_523, "karlo", "up_last"),
    Published(MODEL, f"{KARLO_HUB}/text_encoder", "transformers", 123_650_304, "karlo", "clip", {"tower": "text"}),
    Published(
        MODEL,
        f"{KARLO_HUB}-image-variations/image_encoder",
        "transformers",
        303_966_208,
        "karlo",
        "clip",
        {"tower": "image"},
    ),
    Published(UNET, "google/ddpm-cifar10-32", "diffusers", 35_746_307, "ddpm_cifar10", options=HO),
    Published(UNET, "google/ddpm-cat-256", "diffusers", 113_673_219, "ddpm_lsun_256:cat", options=HO),
)
# Configs that put the sections of several of these together, besides those that name them.
SYSTEMS = ("glide", "glide_base_64:clip", "glide:clip")
