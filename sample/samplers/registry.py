"""The samplers by the objective whose runs they sample from."""

from typing import Any

from sample.samplers.autoencoder import AutoencoderSampler
from sample.samplers.captioner import CaptionerSampler
from sample.samplers.clip import ClipSampler
from sample.samplers.dalle import DalleSampler
from sample.samplers.diffusion import DiffusionSampler
from sample.samplers.dvae import ReconstructionSampler
from sample.samplers.llama import LlamaSampler
from sample.samplers.unidiffuser import UniDiffuserSampler
from sample.samplers.vision_adapter import VisionAdapterSampler

SAMPLERS: dict[str, Any] = {
    "autoencoder": AutoencoderSampler,
    "captioner": CaptionerSampler,
    "clip": ClipSampler,
    "dalle": DalleSampler,
    "diffusion": DiffusionSampler,
    "dvae": ReconstructionSampler,
    "llama": LlamaSampler,
    "unidiffuser": UniDiffuserSampler,
    "vision_adapter": VisionAdapterSampler,
    "vqvae": ReconstructionSampler,
}
