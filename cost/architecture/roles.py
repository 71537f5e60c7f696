"""What parts of networks are for, in the words of the papers that they come from."""

import re
from collections.abc import Collection

_GUIDANCE = "guidance enters here: called for both, it gives uncond + w (cond - uncond)"

# Objective -> part of its config -> role.
_PARTS = {
    "dvae": {"dvae": "stage 1 of DALL-E: pictures to a grid of image tokens, a relaxed choice of codes, and back"},
    "vqvae": {"dvae": "image tokenizer: encoder, nearest codes of a codebook, decoder"},
    "dalle": {
        "dalle": "stage 2: p(caption, image) one token after another; guidance enters at the logits of image tokens, "
        "uncond + w (cond - uncond)",
        "dvae": "stage 1, frozen: makes image tokens of pictures, and pictures of the tokens that are drawn",
    },
    "clip": {"clip": "two encoders into one joint embedding, trained to tell pairs from other pairs of a batch"},
    "diffusion": {
        "denoiser": f"denoiser eps_theta(x_t, t, c): undoes noise step by step; {_GUIDANCE}",
        "text": "text encoder tau_theta(y): features of the caption's tokens, read by the denoiser",
        "clip": "text encoder tau_theta(y): the text tower of a frozen CLIP, read by the denoiser",
        "first_stage": "first stage: E makes latents of pictures, D makes pictures of the latents that are drawn",
    },
    "autoencoder": {
        "autoencoder": "first stage of latent diffusion: E compresses pictures to latents, D restores them",
        "discriminator": "patch discriminator: the adversarial loss; not used after training",
        "lpips": "perceptual loss, frozen: a distance in features; not used after training",
        "output": "log variance of the reconstruction's likelihood",
    },
    "unidiffuser": {
        "unidiffuser": "joint noise prediction eps_theta(x_t, y_s, t, s) of picture and text; guidance enters here: "
        "uncond is the network with the other side at its last time, noise alone",
        "first_stage": "first stage, frozen: makes latents of pictures, and pictures of latents",
        "clip": "encoders, frozen: the picture's CLIP embedding, and features of the caption's tokens",
        "captioner": "text decoder, frozen: makes latents of those features, and writes a caption of latents",
    },
    "captioner": {
        "captioner": "text decoder: GPT-2 that writes a caption behind a prefix made of features",
        "clip": "encoder, frozen: the features that are captioned",
    },
    "llama": {"llama": "causal language model: p(next token)"},
    "vision_adapter": {"vision_adapter": "language model that is told of pictures: p(next token | pictures)"},
}

# Network -> what it is, where an objective does not say more.
_NETWORKS = {
    "autoencoder_gumbel": "image tokenizer: encoder to logits of codes, codebook, decoder",
    "autoencoder_kl": "autoencoder with a Gaussian latent",
    "autoencoder_vq": "autoencoder with a codebook (VQGAN)",
    "captioner": "GPT-2 behind a prefix made of features",
    "clip": "image and text encoders with one joint embedding",
    "clip_text": "the text encoder of a CLIP",
    "dalle": "transformer over caption tokens and image tokens",
    "discriminator": "patch discriminator",
    "dit": "denoiser: transformer over patches, modulated by time and class",
    "dvae": "discrete VAE, stage 1 of DALL-E",
    "dvae_strided": "discrete VAE of dalle_pytorch",
    "gpt2": "causal language model",
    "inception": "features that the Frechet distance compares",
    "llama": "causal language model",
    "lpips": "perceptual distance",
    "point_denoiser": "denoiser of points",
    "text_encoder": "text encoder tau_theta, trained with the network that reads it",
    "unet": "denoiser: convolutions at several resolutions",
    "unidiffuser": "joint denoiser of picture and text",
    "uvit": "denoiser: transformer over time, condition and patches",
    "vision_adapter": "language model with image adapter: cross-attention layers between its own look at pictures",
    "vision_prefix": "language model behind a prefix: vectors that a mapper makes of pictures",
    "vqvae": "image tokenizer with a codebook",
}

_EMBED_TIME = "time embedding: a perceptron of the sines and cosines of t, added in every residual block"
_CROSS = "cross-attention: pixels ask (Q), the caption's tokens answer (K, V)"
_ENCODER_LEVELS = (
    (r"input", "first 3x3 convolution"),
    (r"(?:down|up)_(\d+)_residual_\d+", r"residual block of level \1"),
    (r"mid_residual_\d+", "residual block of the coarsest level"),
    (r"mid_attention", "self-attention at the coarsest level"),
    (r"down_\d+_resample", "to half the height and width"),
    (r"up_\d+_resample", "to twice the height and width"),
    (r"output_norm", "group normalization before the last layer"),
)
_AUTOENCODER = (
    (r"encoder", "encoder E: pictures to latents, coarser level by level"),
    (r"decoder", "decoder D: latents to pixels, finer level by level"),
    (r"quant", "1x1 convolution to the latent: its mean and log variance, or the vector that is quantized"),
    (r"post_quant", "1x1 convolution of the latent, before the decoder"),
    (r"codebook", "codebook: the latents' discrete values"),
    (r"decoder/input", "3x3 convolution of the latent"),
    *((f"(?:encoder|decoder)/{pattern}", role) for pattern, role in _ENCODER_LEVELS),
    (r"encoder/output", "3x3 convolution to the latent's channels"),
    (r"decoder/output", "3x3 convolution to pixels"),
)
_TOKENIZER = (
    (r"encoder", "encoder: pictures to one vector, or logits of the codes, a token"),
    (r"decoder", "decoder: codes to the pixels' statistics"),
    (r"codebook|codes?(_embedding)?", "codebook"),
    (r"(encoder|decoder)/group_\d+_block_\d+", "residual block of four convolutions"),
    (r"encoder/input", "first convolution, of pixels"),
    (r"encoder/output", "1x1 convolution to codes"),
    (r"decoder/input", "embeds codes: the decoder's idea of each"),
    (r"decoder/output", "1x1 convolution to the pixels' statistics"),
)
_TEXT_TOWER = (
    (r"embedding|token", "token embedding"),
    (r"position", "position embedding"),
    (r"blocks_\d+", "transformer layer"),
    (r"final_norm|norm", "last norm"),
    (r"projection", "to the joint embedding"),
)
_LANGUAGE = (
    (r"embedding", "token embedding"),
    (r"position", "position embedding"),
    (r"blocks_\d+", "causal transformer layer"),
    (r"final_norm", "last norm"),
    (r"text_head", "logits of the next token"),
)
_TILE_ENCODER = (
    (r"encoder", "image encoder: a ViT over the tiles of a picture"),
    (r"encoder/patch", "patches to tokens"),
    (r"encoder/global_blocks_\d+", "gated transformer layer on top"),
    (r"encoder/blocks_\d+", "transformer layer, over all tiles"),
    (r"encoder/(first|last)_tile", r"embedding of a tile's place, \1"),
    (r"encoder/(first|last)_tile_gate", "its gate, 0 at first"),
    (r"encoder/(tile_)?position", "position embedding"),
    (r"encoder/position_gate", "gate between the position embeddings of patches and of tiles"),
    (r"encoder/class_embedding", "a tile's own token"),
)
_VIT = (
    (r"patch", "patches to tokens"),
    (r"time_mlp", "time embedding: a perceptron of the sines and cosines of t"),
    (r"in_blocks_\d+", "transformer layer of the first half, kept for its long skip"),
    (r"mid_block", "transformer layer in the middle"),
    (r"skips_\d+", "long skip: joins a first-half layer's output with what comes here"),
    (r"out_blocks_\d+", "transformer layer of the second half"),
    (r"position", "position embedding of all tokens"),
    (r"final_norm", "last norm"),
    (r"pixel_head", "tokens of patches to their pixels"),
)


def _within(path: str, rules: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{path}/(?:{pattern})", role) for pattern, role in rules)


# Network -> (pattern of a module's path, role), where \1 is what the pattern's first group matched. The first holds.
_MODULES: dict[str, tuple[tuple[str, str], ...]] = {
    "autoencoder_gumbel": _AUTOENCODER,
    "autoencoder_kl": _AUTOENCODER,
    "autoencoder_vq": _AUTOENCODER,
    "captioner": (
        (r"encode_prefix", "features to the latents that UniDiffuser draws"),
        (r"decode_prefix", "latents to the prefix"),
        (r"language", "GPT-2, which writes the caption"),
        (r"language/embedding", "token embedding, and the head"),
        *_within("language", _LANGUAGE),
        (r"[^/]*", "makes the prefix of features"),
    ),
    "clip": (
        (r"image", "image encoder"),
        (r"text", "text encoder; its state at the end token is the caption's"),
        (r"logit_scale", "log of the inverse temperature of the contrastive loss"),
        *_within("text", _TEXT_TOWER),
        (r"image/patch", "patches to tokens"),
        (r"image/class_embedding", "the token that the embedding is read from"),
        (r"image/first_norm", "norm before the first layer"),
        (r"image/stem_\d+", "convolution of the stem"),
        (r"image/stage_\d+_block_\d+", "bottleneck block, its convolutions anti-aliased"),
        (r"image/pool", "attention pooling: the mean asks all positions"),
        *_within("image", _TEXT_TOWER),
    ),
    "clip_text": ((r"text", "text encoder"), *_within("text", _TEXT_TOWER)),
    "dalle": (
        (r"blocks_\d+", "sparse transformer layer: row, column or convolutional attention of image tokens"),
        (r"bos", "the token that the stream begins with"),
        (r"text_embedding", "embedding of caption tokens"),
        (r"image_embedding", "embedding of image tokens"),
        (r"text_position", "position embedding of caption tokens, and of what pads each place"),
        (r"(row|column)_position", r"\1 embedding of image tokens"),
        (r"text_head", "logits of the next caption token"),
        (r"image_head", "logits of the next image token: guidance enters here"),
        (r"final_norm", "last norm"),
    ),
    "discriminator": (
        (r"conv_\d+|norm_\d+", "strided layer of the patch classifier"),
        (r"output", "one logit a patch: real or decoded"),
    ),
    "dit": (
        (r"patch", "patches to tokens"),
        (r"time_\d+", "time embedding: a perceptron of the sines and cosines of t"),
        (r"label", "class embedding, added to that of time; its last row stands for none, for guidance"),
        (r"context_\d+", "the caption's tokens to the network's width, for cross-attention"),
        (r"blocks_\d+", "DiT block: adaLN-Zero self-attention, cross-attention if there is a caption, feed-forward"),
        (r"blocks_\d+/modulation", "adaLN-Zero: shift, scale and gate of both branches, from time and class"),
        (r"final_modulation", "adaLN: shift and scale of the last norm"),
        (r"pixel_head", "tokens of patches to their pixels"),
    ),
    "dvae": _TOKENIZER,
    "dvae_strided": _TOKENIZER,
    "gpt2": ((r"embedding", "token embedding, and the head"), *_LANGUAGE),
    "llama": _LANGUAGE,
    "lpips": (
        (r"conv_\d+_\d+", "VGG16's convolution"),
        (r"lin_\d+", "weighs the squared differences of a layer's channels"),
    ),
    "point_denoiser": (
        (r"time", "time embedding"),
        (r"into", "points to the network's width"),
        (r"(up|down)_\d+", "residual layers' dense halves, told the time"),
        (r"out", "to the prediction"),
    ),
    "text_encoder": _TEXT_TOWER,
    "unet": (
        (r"time_\d+", _EMBED_TIME),
        (r"class", "class embedding; its last row stands for none where guidance needs one"),
        *_ENCODER_LEVELS,
        (r".*_residual_\d+/time", "where the time embedding enters"),
        (r".*_residual_\d+/skip", "1x1 convolution where the width changes"),
        (r"(?:down|up)_(\d+)_attention_\d+", r"self-attention among the pixels of level \1"),
        (r".*_attention(?:_\d+)?/input", "projection of the pixels to tokens"),
        (r".*_attention(?:_\d+)?/output", "projection of the tokens to pixels, 0 at first"),
        (r"output", "3x3 convolution to the prediction"),
    ),
    "unidiffuser": (
        (r"text_in", "the caption's latents to tokens"),
        (r"clip_in", "the picture's CLIP embedding to a token"),
        (r"text_head", "tokens to the noise of the caption's latents"),
        (r"clip_head", "its token to the noise of the CLIP embedding"),
        (r"kind|data_type.*", "embedding of the kind of data"),
        *_VIT,
    ),
    "uvit": (
        (r"context", "the caption's tokens to the network's width: they join the sequence, no cross-attention"),
        (r"label", "class embedding, a token; its last row stands for none where guidance needs one"),
        (r"token_conv", "3x3 convolution of the patches' tokens"),
        (r"image_conv", "3x3 convolution of the predicted picture"),
        *_VIT,
    ),
    "vision_adapter": (
        *_TILE_ENCODER,
        (r"projection", "image features to the language model's width"),
        (r"cross_blocks_\d+", "image adapter: gated cross-attention, tokens ask (Q), the picture answers (K, V)"),
        (r"cross_blocks_\d+/attention", "cross-attention to the picture's features"),
        (r"extra_embedding", "embedding of the picture's token"),
        (r"language", "the language model"),
        *_within("language", _LANGUAGE),
    ),
    "vision_prefix": (
        *_TILE_ENCODER,
        (r"projection", "image features to the language model's width"),
        (r"prefix", "learned states, which the mapper makes the prefix of"),
        (r"mapper_blocks_\d+", "mapper: image features and learned states see each other"),
        (r"extra_embedding", "embedding of the picture's tokens"),
        (r"language", "the language model"),
        *_within("language", _LANGUAGE),
    ),
    "vqvae": _TOKENIZER,
}

# What layers are called in all networks, deeper than what those rules name.
_LAYERS = (
    (r"context_attention", _CROSS),
    (r"self_attention", "self-attention"),
    (r"attention", "self-attention"),
    (r"mlp", "feed-forward block"),
    (r".*norm(_\d+)?", "normalization"),
    (r"(attention|mlp)_gate", "gate, 0 at first"),
    (r"blocks_\d+", "transformer layer: self-attention, cross-attention, feed-forward (GEGLU)"),
    (r"conv(_\d+)?", "convolution"),
)


def role_of_part(objective: str, part: str, network: str) -> str:
    """What a part of an experiment is for.

    Args:
      objective: `config.objective`.
      part: name in `config.models` or `config.frozen`.
      network: name in `models.MODELS`.
    """
    return _PARTS.get(objective, {}).get(part) or _NETWORKS.get(network, "")


def role_of(network: str, path: str, within: Collection[str] = ()) -> str:
    """What a module is for; "" if its name says it.

    Args:
      network: name in `models.MODELS`.
      path: of the module in it, names with slashes between; "" for the whole.
      within: names of the modules in it.
    """
    if not path:
        return _NETWORKS.get(network, "")
    if network == "unet" and path.partition("/")[2] == "" and any(name.startswith("blocks_") for name in within):
        level = re.match(r"(?:down|up)_(\d+)", path)
        pixels = f"level {level[1]}" if level else "the coarsest level"
        return f"transformer over the pixels of {pixels}: self-attention, then cross-attention to the caption"
    for pattern, role in _MODULES.get(network, ()):
        if found := re.fullmatch(pattern, path):
            return found.expand(role)
    name = path.rpartition("/")[2]
    return next((role for pattern, role in _LAYERS if re.fullmatch(pattern, name)), "")
