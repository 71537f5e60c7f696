"""Which mesh axis holds which dimension of a parameter, for each family of networks: `config.mesh.rules`.

A rule is (path pattern, mesh axis of each leading dimension); the first pattern found in a path decides. `fsdp` splits
the input width of what reads the residual stream and the output width of what writes to it, `tensor` the heads and the
hidden width, so that an attention or feed-forward block needs one sum over `tensor`. Norms and biases are small and
stay whole. With an axis of size 1 a rule changes nothing.
"""

WHOLE = ((".*", ()),)

TRANSFORMER = (
    (r"attention/query_key_value/kernel", ("fsdp", None, "tensor")),
    (r"attention/query_key_value/bias", (None, "tensor")),
    (r"attention/out/kernel", ("tensor", None, "fsdp")),
    (r"mlp/up/kernel", ("fsdp", "tensor")),
    (r"mlp/up/bias", ("tensor",)),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
    (r"(embedding|position|bos)/embedding", (None, "fsdp")),
    (r"_head/kernel", ("fsdp", "tensor")),
    (r"_head/bias", ("tensor",)),
)

# The language model and the vision adapter. Heads of keys and values are few: `tensor` must divide them too.
LLAMA = (
    (r"tile_position/(embedding|grid)", (None, None, None, "fsdp")),
    *TRANSFORMER,
    (r"attention/query/kernel", ("fsdp", "tensor")),
    (r"attention/key_value/kernel", ("fsdp", None, "tensor")),
    (r"mlp/up_gate/kernel", ("fsdp", None, "tensor")),
    (r"projection/kernel", ("fsdp",)),
    (r"patch/kernel", (None, None, None, "fsdp")),
    *WHOLE,
)

# Pixels and statistics have 3 and 6 channels, which no axis divides: there the other side of the kernel is split.
# No trained convolution is split on both sides: XLA's partitioner then gives wrong gradients of its input when a device
# has few rows (seen on the CPU with jax 0.10.2: 5 % off at 2 rows on data 2 x fsdp 2 x tensor 2).
# tests/train/distributed/test_devices.py compares every objective on such a mesh.
CONVOLUTIONS = (
    (r"encoder/input/kernel", (None, None, None, "fsdp")),
    (r"decoder/output/kernel", (None, None, "fsdp")),
    (r"decoder/input/kernel", ("tensor", "fsdp")),
    (r"(conv_[14]|id_path|encoder/output)/kernel", (None, None, None, "fsdp")),
    (r"conv_[23]/kernel", (None, None, None, "tensor")),
)

# Of a frozen tokenizer, through which no gradient goes, more can be split.
FROZEN_CONVOLUTIONS = (
    (r"encoder/input/kernel", (None, None, None, "fsdp")),
    (r"decoder/output/kernel", (None, None, "fsdp")),
    (r"decoder/input/kernel", ("tensor", "fsdp")),
    (r"(conv_\d|id_path|encoder/output)/kernel", (None, None, "fsdp", "tensor")),
)

# Of one that is a vector-quantized autoencoder, before all others: its layers have the names of others, and one head.
FROZEN_VQGAN = ((r"^dvae/", ()),)

# Both towers; a convolutional one is split on its output channels alone, as above.
CLIP = (
    *TRANSFORMER,
    (r"(patch|conv)/kernel", (None, None, None, "fsdp")),
    (r"pool/(query|key|value)/kernel", ("fsdp", "tensor")),
    (r"pool/(query|key|value)/bias", ("tensor",)),
    (r"pool/out/kernel", ("tensor", None, "fsdp")),
    (r"projection/kernel", ("fsdp",)),
    *WHOLE,
)

# Both backbones of diffusion, with the text encoder that may be trained beside them. A residual block's first
# convolution is split on its output channels over `tensor`, all others over `fsdp`, each on one side alone, as above.
# The text encoder's table of tokens stays whole: rows looked up in a split one are spread over the width first.
UNET = (
    *TRANSFORMER,
    (r"/query/kernel", ("fsdp", "tensor")),
    (r"/key_value/kernel", ("fsdp", None, "tensor")),
    (r"mlp/up_gate/kernel", ("fsdp", None, "tensor")),
    (r"mlp/up_gate/bias", (None, "tensor")),
    (r"class/embedding", (None, "fsdp")),
    (r"(time|time_1)/kernel", ("fsdp", "tensor")),
    (r"time_2/kernel", ("tensor", "fsdp")),
    (r"denoiser/output/kernel", (None, None, "fsdp")),
    (r"conv_1/kernel", (None, None, None, "tensor")),
    (r"(input|output|conv|conv_2|skip)/kernel", (None, None, None, "fsdp")),
    *WHOLE,
)

UVIT = (
    *TRANSFORMER,
    (r"label/embedding", (None, "fsdp")),
    (r"context/kernel", (None, "fsdp")),
    (r"(skips_\d+|norm)/projection/kernel", ("fsdp", "tensor")),
    (r"(patch|token_conv)/kernel", (None, None, None, "fsdp")),
    *WHOLE,
)

DIT = (
    *TRANSFORMER,
    (r"/query/kernel", ("fsdp", "tensor")),
    (r"/query/bias", ("tensor",)),
    (r"/key_value/kernel", ("fsdp", None, "tensor")),
    (r"/key_value/bias", (None, "tensor")),
    (r"label/embedding", (None, "fsdp")),
    (r"(time_1|context_1)/kernel", (None, "fsdp")),
    (r"(time_2|context_2)/kernel", ("fsdp", "tensor")),
    (r"modulation/kernel", ("fsdp", None, "tensor")),
    (r"patch/kernel", (None, None, None, "fsdp")),
    *WHOLE,
)

# First stages and their discriminators: each convolution on one side alone, as above. Pixels, latents and logits have
# few channels, which no axis divides, and attention has one head. A step with the discriminator on data 2 x fsdp 2 x
# tensor 2 is that of one device to 1e-13 in every entry of the gradients in float64. In float32 to 2.4e-5 from
# disturbed parameters in two batches, and 7e-5 at the start, where reconstructions are nearly blank; more where a pixel
# is right but for rounding, which then decides the sign of its absolute error's gradient.
_FIRST_STAGES = (
    (r"attention/query_key_value/kernel", ("fsdp",)),
    (r"attention/out/kernel", (None, None, "fsdp")),
    (r"(encoder|decoder)/output/kernel", (None, None, "fsdp")),
    (r"conv_1/kernel", (None, None, None, "tensor")),
    (r"(input|conv|conv_\d|skip)/kernel", (None, None, None, "fsdp")),
)
AUTOENCODER = _FIRST_STAGES + WHOLE

# Of a frozen first stage, before the rules of what learns its latents.
FIRST_STAGE = (
    *((rf"^first_stage/.*{pattern}", axes) for pattern, axes in _FIRST_STAGES),
    (r"^first_stage/", ()),
)
# Or whole on every device, beside a network that takes the memory: it needs no collectives of its own then.
WHOLE_FIRST_STAGE = ((r"^first_stage/", ()),)

# GPT-2 behind a prefix, with the frozen CLIP whose features it reads.
CAPTIONER = (
    (r"^clip/", ()),
    *TRANSFORMER,
    (r"(encode_prefix|decode_prefix|mapper_input|mapper_up)/kernel", ("fsdp",)),
    (r"mapper_down/kernel", ("fsdp", "tensor")),
    *WHOLE,
)

# UniDiffuser; the CLIP and the captioner beside it are small, and stay whole.
UNIDIFFUSER = (
    (r"^(clip|captioner)/", ()),
    *TRANSFORMER,
    (r"(clip_in|text_in)/kernel", (None, "fsdp")),
    (r"data_type/embedding", (None, "fsdp")),
    (r"skips_\d+/projection/kernel", ("fsdp", "tensor")),
    (r"patch/kernel", (None, None, None, "fsdp")),
    *WHOLE,
)
