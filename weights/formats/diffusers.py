"""Networks and pipelines of the diffusers library: which files they are in, how they are recognized, read and written.

UNets are in `diffusers_unet.py`, first stages in `diffusers_autoencoder.py`, schedulers in `diffusers_scheduler.py`,
what whole pipelines have beside in `diffusers_pipeline.py`; the format that all are of is declared here.
"""

from typing import Any

from cli.errors import UserError
from models import create_model
from models.captioner import Captioner
from models.dit import DiT
from models.unet import UNet
from models.unidiffuser import UniDiffuser
from weights.files.layout import Tensors, Tree
from weights.files.origin import Origin, Subfolder, peek_json, read_weights
from weights.formats import clip_text, diffusers_dit, diffusers_text_decoder, diffusers_unidiffuser
from weights.formats import diffusers_unidiffuser_pipeline as unidiffuser_pipeline
from weights.formats.contract import Converted, Files, Format, Network, Pipeline, refuse_unread
from weights.formats.diffusers_autoencoder import NAMES as AUTOENCODERS
from weights.formats.diffusers_autoencoder import autoencoder_files, read_autoencoder
from weights.formats.diffusers_blocks import with_new_names
from weights.formats.diffusers_pipeline import (
    GUIDANCE,
    STEPS,
    TEXT_FOLDER,
    check_parts,
    is_whole,
    pipeline_files,
    read_text_part,
)
from weights.formats.diffusers_scheduler import read_scheduler
from weights.formats.diffusers_unet import CONDITION, PLAIN, unet_config, unet_fields, unet_layout
from weights.formats.dit import dit_run
from weights.formats.runs import AUTOENCODER_OPTIONS, captioner_run, check_latents, denoiser_run

CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
PIPELINE_FOLDER = "unet"
FIRST_STAGE_FOLDERS = ("vae", "vqvae")
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    *("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"),
    *("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    *("diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.fp16.bin"),
)

_ALONE = (diffusers_text_decoder.CLASS, diffusers_unidiffuser.CLASS, *AUTOENCODERS)


def read_unet(origin: Origin) -> tuple[dict[str, Any], Tensors]:
    """Reads what `save_pretrained` of a UNet or of a pipeline with one wrote: ({"name": "unet", fields}, tensors).

    Raises:
      UserError: if files are missing or say something else.
    """
    part = Subfolder(origin, PIPELINE_FOLDER)
    origin.require(f"{PIPELINE_FOLDER}/{CONFIG}", CONFIG)  # of which a message names both
    if part.find(CONFIG) is not None:
        origin = part
    return unet_fields(origin.json(CONFIG)), read_weights(origin, WEIGHTS)


def unet_files(model: UNet, params: Tree) -> Files:
    """What `from_pretrained` of the library's UNet reads.

    Raises:
      UserError: if the library cannot compute what `model` does.
    """
    return {CONFIG: unet_config(model), WEIGHTS[0]: unet_layout(model).write_deferred({"params": params})}


def _dit_origin(origin: Origin) -> Origin | None:
    """Where the files of a DiT are; None if there is none."""
    for place in (Subfolder(origin, diffusers_dit.PIPELINE_FOLDER), origin):
        config = place.find(CONFIG)
        if config is not None and peek_json(config).get("_class_name") == diffusers_dit.CLASS:
            return place
    return None


def _recognizes(origin: Origin) -> bool:
    if _dit_origin(origin) is not None:
        return True
    config = origin.find(f"{PIPELINE_FOLDER}/{CONFIG}", CONFIG)
    return config is not None and peek_json(config).get("_class_name") in (PLAIN, CONDITION, *_ALONE)


def _read(origin: Origin, subfolder: str = "", latent_scale: str = "", tokenizer: str = "") -> Converted:
    if subfolder and subfolder not in (PIPELINE_FOLDER, diffusers_dit.PIPELINE_FOLDER):
        origin = Subfolder(origin, subfolder)
        origin.require(CONFIG)
    dit = _dit_origin(origin)
    config = origin.find(f"{PIPELINE_FOLDER}/{CONFIG}", CONFIG)
    # Its class may be anything, a list too.
    kind = None if config is None else peek_json(config).get("_class_name")
    if dit is None and kind in (diffusers_text_decoder.CLASS, diffusers_unidiffuser.CLASS):
        refuse_unread(f"a {kind}", latent_scale=latent_scale, tokenizer=tokenizer)
    if dit is None and kind == diffusers_text_decoder.CLASS:
        fields = diffusers_text_decoder.text_decoder_fields(origin.json(CONFIG))
        tensors = read_weights(origin, WEIGHTS, diffusers_text_decoder.IGNORED)
        params = diffusers_text_decoder.text_decoder_from_diffusers(create_model(**fields), tensors)
        return captioner_run(fields, params)
    if dit is None and kind == diffusers_unidiffuser.CLASS and origin.find(unidiffuser_pipeline.TEXT_DECODER):
        return unidiffuser_pipeline.read_pipeline(origin, WEIGHTS)
    if dit is None and kind == diffusers_unidiffuser.CLASS:
        place = origin if origin.find(f"{PIPELINE_FOLDER}/{CONFIG}") is None else Subfolder(origin, PIPELINE_FOLDER)
        fields = diffusers_unidiffuser.unidiffuser_fields(place.json(CONFIG))
        tensors = read_weights(place, WEIGHTS, diffusers_unidiffuser.IGNORED)
        params = diffusers_unidiffuser.unidiffuser_from_diffusers(create_model(**fields), tensors)
        return Converted({"objective": "", "models": {"unidiffuser": fields}}, {"unidiffuser": params})
    if dit is None and kind in tuple(AUTOENCODERS):
        refuse_unread("a first stage", tokenizer=tokenizer)
        return read_autoencoder(origin.json(CONFIG), read_weights(origin, WEIGHTS), latent_scale)
    process, sample = (None, {}) if origin.find(SCHEDULER) is None else read_scheduler(origin.json(SCHEDULER))
    if dit is not None:
        fields = diffusers_dit.dit_fields(dit.json(CONFIG))
        refuse_unread("a DiT", tokenizer=tokenizer)
        params = diffusers_dit.dit_from_diffusers(create_model(**fields), read_weights(dit, WEIGHTS))
        stage, notes = _find_first_stage(origin, fields["in_channels"], latent_scale)
        return dit_run(fields, params, process, sample, stage, notes)
    if origin.find(f"{PIPELINE_FOLDER}/{CONFIG}") is not None:
        parts = {**dict.fromkeys((PIPELINE_FOLDER, *FIRST_STAGE_FOLDERS), WEIGHTS), TEXT_FOLDER: clip_text.WEIGHTS}
        origin.foretell(*([f"{folder}/{name}" for name in names] for folder, names in parts.items()))
    fields, tensors = read_unet(origin)
    model = create_model(**fields)
    params = unet_layout(model).read_deferred(model, with_new_names(tensors))["params"]
    text = read_text_part(origin, tokenizer) if fields.get("context_width") else None
    if text is None:
        refuse_unread("a UNet without a text encoder", tokenizer=tokenizer)
    stage, notes = _find_first_stage(origin, fields["in_channels"], latent_scale, needed=text is not None)
    found = {"vae": stage is not None, "text_encoder": text is not None, "scheduler": process is not None}
    if text is not None or is_whole(origin):
        notes += check_parts(origin, found)
    if text is not None:
        if (width := text[0]["text_width"]) != fields["context_width"]:
            raise UserError(f"its text encoder has width {width}, and its UNet reads {fields['context_width']}")
        sample = {**sample, "steps": STEPS, "guidance": GUIDANCE}  # whatever the scheduler
    return denoiser_run(fields, params, process, sample, stage, notes, text)


def _find_first_stage(
    origin: Origin, channels: int, latent_scale: str, needed: bool = False
) -> tuple[tuple[dict[str, Any], Tree] | None, tuple[str, ...]]:
    """({name, fields}, parameters) of a pipeline's first stage, if it makes latents of so many channels; and notes.

    One that is `needed` is refused where it does not fit or cannot be read, and a scale where there is none.
    """
    for folder in FIRST_STAGE_FOLDERS:
        part = Subfolder(origin, folder)
        if (path := part.find(CONFIG)) is None or peek_json(path).get("_class_name") not in tuple(AUTOENCODERS):
            continue
        try:
            read = read_autoencoder(part.json(CONFIG), read_weights(part, WEIGHTS), latent_scale)
        except UserError as error:
            if needed or latent_scale:
                raise
            return None, (f"its first stage is left out: {error}",)
        fields = read.config["models"]["autoencoder"]
        if fields["latent_channels"] == channels:
            return (fields, read.params["autoencoder"]), read.notes
        if needed:
            check_latents(channels, fields["latent_channels"])
    refuse_unread("a network without a first stage", latent_scale=latent_scale)
    return None, ()


def _write(network: Network) -> Files:
    model, params = network.model, network.params
    if isinstance(model, DiT):
        if not network.null_class:
            raise UserError(
                "this DiT has no class for none, and one for diffusers has; train it with config.loss.dropout"
            )
        return {
            CONFIG: diffusers_dit.dit_config(model),
            WEIGHTS[0]: diffusers_dit.dit_to_diffusers(model, params),
        }
    if isinstance(model, Captioner):
        return {
            CONFIG: diffusers_text_decoder.text_decoder_config(model),
            WEIGHTS[0]: diffusers_text_decoder.text_decoder_to_diffusers(params),
        }
    if isinstance(model, UniDiffuser):
        write = unidiffuser_pipeline.pipeline_files if network.beside else unidiffuser_pipeline.network_files
        return write(network, CONFIG, WEIGHTS[0])
    return unet_files(model, params) if isinstance(model, UNet) else autoencoder_files(network, CONFIG, WEIGHTS[0])


def _write_pipeline(pipeline: Pipeline) -> Files:
    return pipeline_files(pipeline, _write(pipeline.networks["denoiser"]))


FORMAT = Format(
    name="diffusers",
    networks=("unet", "dit", "unidiffuser", "captioner", *AUTOENCODERS.values()),
    inputs="a UNet, a DiT, a UniDiffuser, its captioner or a first stage; of a pipeline the first two with a first "
    "stage and what its scheduler says; whole pipelines of Stable Diffusion and UniDiffuser",
    outputs="from_pretrained(DIR) of UNet2DModel, UNet2DConditionModel if it has transformers, DiTTransformer2DModel, "
    "UniDiffuserModel (UniDiffuserPipeline, given its tokenizers), UniDiffuserTextDecoder, AutoencoderKL or VQModel; "
    "StableDiffusionPipeline of a run whose captions a frozen clip_text reads",
    recognizes=_recognizes,
    read=_read,
    write=_write,
    beside={"unidiffuser": unidiffuser_pipeline.BESIDE},
    options={
        "subfolder": "of a pipeline: the folder of a network that is read alone, such as vae; a unet or a transformer "
        "comes with its scheduler and first stage in any case",
        "tokenizer": "of a pipeline that comes without one: CLIP's vocabulary, or a tokenizer.json",
        **AUTOENCODER_OPTIONS,
    },
    write_pipeline=_write_pipeline,
)
