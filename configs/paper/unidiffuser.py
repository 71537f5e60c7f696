"""UniDiffuser as published: pictures, captions and both by one U-ViT of 0.95 billion parameters, versions 0 and 1.

Paper: Bao et al. 2023, "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", section 5.1 and
appendix.

    python -m train --config=configs/paper/unidiffuser.py --workdir=runs/unidiffuser_256
    python -m train --config=configs/paper/unidiffuser.py:v0_512 --workdir=runs/unidiffuser_512
    python -m train --config=configs/paper/unidiffuser.py:v0_aesthetics --workdir=runs/unidiffuser_aesthetics

Arguments, each a stage that begins with what the one before it left, its updates, batches and data: `v0_256` (default;
250,000 of 11,264; laion2B-en), `v0_512` (200,000 of 2112; laion-high-resolution), `v0_aesthetics` (220,000 of 2112;
laion-aesthetics v2 5+); `v1_256`, `v1_512`, `v1_aesthetics` (the same of a network that is told the kind of data, 0);
`debug` (seconds; on scenes).

Parameters: 952,504,912 of version 0 and 952,509,520 of version 1 with pictures of 512 x 512, and 1,179,648 fewer
positions with pictures of 256. Frozen ones: 83,653,863 of kl_f8, 124,539,712 of the text decoder, and the towers of two
CLIPs, the pictures' of ViT-B/32 and the captions' of ViT-L/14. pretrained/sd_vae is Stable Diffusion's first stage, and
pretrained/unidiffuser the released pipeline, converted, of which CLIP, text decoder and tokenizers are taken;
configs/paper/captioner.py trains the decoder anew.

Hardware: 88 A100 of 80 GB for 28 days, as the authors say. No result of this config was measured here. LAION's pictures
are the user's to get (docs/own_data.md).

The authors published networks and samplers, and no code of training. Stages, AdamW with 2e-4 after 5000 updates of
warm-up, its constants and decay are the paper's, from a summary of it and in part from an issue of the authors'
repository; the moving average is U-ViT's; schedule, scales, steps and guidance are their sampler's. Version 1 went on
from version 0, told whether a pair is of the web (0) or one of the authors' own (1), as their README says; for how long
is not published. What differs, as far as known:

* Version 1 has the stages of version 0 from the beginning, whose pairs are all of the web: `config.data.data_type` is
  0, for samples too. To train the released network on other pairs, set 1. One run learns one kind.
* The last stage begins with the parameters alone; there with the optimizer's state, too.
* Pictures are cut to their central square by both encoders' rule together; CLIP's picture is resized from it.
* Networks compute in bfloat16.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_process, make_debug
from configs.mesh_rules import FIRST_STAGE, UNIDIFFUSER
from configs.paper import captioner, first_stage

# stage -> (side of a picture, updates, batch, dataset, the stage before, topology, microbatches)
STAGES = {
    "256": (256, 250_000, 11_264, "folder/laion_2b_en", "", "v5e:16x16", 4),
    "512": (512, 200_000, 2112, "folder/laion_high_resolution", "256", "v5e:8x8", 11),
    "aesthetics": (512, 220_000, 2112, "folder/laion_aesthetics", "512", "v5e:8x8", 11),
}
VERSIONS = {"v0": "", "v1": "_v1"}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    arguments = tuple(f"{version}_{stage}" for version in VERSIONS for stage in STAGES)
    argument = check_argument(argument, (*arguments, "debug"))
    debug = argument == "debug"
    version, stage = ["v1", "256"] if debug else argument.split("_")
    image_size, steps, batch_size, dataset, before, topology, microbatches = STAGES[stage]
    config = get_defaults()
    config.objective = "unidiffuser"
    config.steps = steps
    config.batch_size = batch_size

    config.data.dataset = dataset
    config.data.image_size = image_size
    config.data.transform = "center_square"
    config.data.text_length = 77
    config.data.tokenizer = "pretrained/unidiffuser/tokenizer.json"
    config.data.workers = 16

    for key in ("latent_moments", "image_features", "caption_latents"):
        config.data[key] = ""  # "auto" or a folder: those that scripts.precompute stored
    config.data.data_type = 0 if version == "v1" else -1  # of all examples: 0 for pairs of the web, 1 for others
    config.frozen.first_stage = first_stage.get_frozen("debug" if debug else "kl_f8", "pretrained/sd_vae", 0.18215)
    config.frozen.clip = captioner.get_frozen_clip()
    config.frozen.captioner = captioner.get_frozen_captioner("pretrained/unidiffuser")

    source = f"runs/unidiffuser{VERSIONS[version]}_{before}" if before else ""
    config.initialize.unidiffuser = ConfigDict({"source": source, "part": "unidiffuser"})
    config.models.unidiffuser = ConfigDict()
    model = config.models.unidiffuser
    model.name = "unidiffuser"
    model.image_size = image_size // 2 ** (len(config.frozen.first_stage.multipliers) - 1)
    model.patch_size = 2
    model.width = 1536
    model.depth = 30
    model.heads = 24
    model.in_channels = config.frozen.first_stage.latent_channels
    model.data_types = 2 if version == "v1" else 0
    model.implementation = "auto"
    model.scan = True
    model.remat = "full"
    model.dtype = "bfloat16"

    config.process = get_process({"name": "discrete", "kind": "scaled_linear", "steps": 1000}, latents=True)
    config.process.schedule.start = 0.00085
    config.process.schedule.end = 0.012
    config.process.prediction = "eps"
    config.process.clip = False
    config.process.time_shift = 1  # steps are counted from 1

    config.scales = ConfigDict({"clip": 1.0, "text": 1.0})

    config.loss.reduction = "elements"
    config.loss.image_weight = 1.0
    config.loss.clip_weight = 1.0
    config.loss.text_weight = 1.0

    config.sample.mode = ""  # a key of sample.samplers.unidiffuser_modes.MODES; "" for what is given
    config.sample.sampler = "dpm_solver_singlestep"
    config.sample.steps = 50
    config.sample.spacing = "time"
    config.sample.unconditional = "noise"
    config.sample.noise = "authors"
    config.sample.data_type = -1  # the kind that was learned
    config.sample.guidance = 8.0  # the authors' s = 7
    config.sample.temperature = 0.0
    config.sample.top_k = 0
    config.sample.top_p = 1.0
    config.sample.beams = 5
    config.sample.length_penalty = 1.0
    config.sample.caption_length = 67

    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.9
    config.optimizer.weight_decay = 0.03
    config.optimizer.no_decay = r"(?!)"  # matches nothing: all parameters decay
    config.optimizer.schedule.name = "warmup_steps_down"  # constant behind the warm-up
    config.optimizer.schedule.peak = 2e-4
    config.optimizer.schedule.warmup_steps = 5000
    config.ema.decay = 0.9999
    config.ema.warm_up = False

    config.mesh.fsdp = 8
    config.mesh.microbatches = microbatches
    config.mesh.rules = FIRST_STAGE + UNIDIFFUSER
    config.mesh.topology = topology  # see docs/tpu.md

    config.checkpoint.every = 5000
    config.evaluate.every = 5000
    config.evaluate.previews = 16
    config.log.every = 100
    if debug:
        make_debug(config, steps=4, batch_size=8)
        config.mesh.microbatches = 1
        captioner.shrink_frozen(config)
        model.image_size = 32 // 2 ** (len(config.frozen.first_stage.multipliers) - 1)
        model.patch_size, model.width, model.depth, model.heads = 4, 32, 2, 2
        config.sample.steps = 3
        config.sample.beams = 2
        config.sample.caption_length = 24
    model.clip_width = config.frozen.clip.embed_dim
    model.text_length = config.frozen.captioner.prefix_length
    model.text_width = config.frozen.captioner.latent_width
    config.lock()
    return config
