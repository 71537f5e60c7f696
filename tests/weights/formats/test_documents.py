"""Every key of every document of other projects: null, of another type, of another length, out of range."""

import copy

import pytest

import models
from cli.errors import UserError
from weights.files.fields import IDLE, fixed, flag, group, read_fields, real, several, whole, word
from weights.files.layout import model_shapes
from weights.formats import (
    diffusers_autoencoder,
    diffusers_dit,
    diffusers_scheduler,
    diffusers_unet,
    dit,
    open_clip,
    transformers,
    uvit,
)
from weights.formats import transformers_gpt2 as gpt2
from weights.formats import transformers_llama as llama
from weights.formats import transformers_mllama as mllama

from ..clip_samples import FIELDS, RESNET
from ..unet_samples import ADM, STABLE_DIFFUSION_1


def unet(fields):
    return diffusers_unet.unet_config(models.create_model(**fields))


def open_clip_document(fields):
    return open_clip.clip_config(models.create_model(**fields))


CONFIG, PREPROCESSOR = transformers.clip_configs(models.create_model(**FIELDS))
UVIT = {"image_size": 8, "patch_size": 2, "in_channels": 3, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}
UVIT_ARGUMENTS = uvit.uvit_arguments(models.create_model("uvit", activation="gelu", convolution="image", **UVIT))
DIT = models.create_model("dit", **UVIT, out_channels=6)
SIZES = {"text_vocab_size": 9, "width": 8, "depth": 4, "heads": 2, "kv_heads": 1, "mlp_hidden": 8, "rope_factor": 8.0}
LLAMA = llama.text_config(models.create_model("llama", **SIZES))
GPT2 = gpt2.gpt2_config(models.create_model("gpt2", text_vocab_size=9, length=8, width=8, depth=2, heads=2))
TILES = {"cross_layers": (1, 3), "image_token": 9, "tile_size": 8, "patch_size": 4, "image_width": 8, "image_heads": 2}
TILES |= {"image_layers": 2, "global_layers": 1, "feature_layers": (0,)}
MLLAMA = mllama.mllama_config(models.create_model("vision_adapter", **SIZES, **TILES))
FIRST_STAGE = {"image_size": 16, "width": 8, "multipliers": (1, 2), "groups": 4, "latent_scale": 0.5}
# Name -> (a document as it is written, what reads it, its table).
DOCUMENTS = {
    "UNet2DModel": (unet(ADM), diffusers_unet.unet_fields, diffusers_unet._TABLES[diffusers_unet.PLAIN]),
    "UNet2DConditionModel": (
        unet(STABLE_DIFFUSION_1),
        diffusers_unet.unet_fields,
        diffusers_unet._TABLES[diffusers_unet.CONDITION],
    ),
    **{
        name: (
            diffusers_autoencoder.autoencoder_config(models.create_model(ours, **FIRST_STAGE), {}),
            *(diffusers_autoencoder.autoencoder_fields, diffusers_autoencoder._TABLES[name]),
        )
        for name, ours in diffusers_autoencoder.NAMES.items()
    },
    **{
        name: ({"_class_name": name}, diffusers_scheduler.read_scheduler, diffusers_scheduler._table(name))
        for name in ("DDIMScheduler", "UniPCMultistepScheduler")
    },
    "CLIPModel": (CONFIG, transformers.clip_fields, transformers._CONFIG),
    "GPT-2": (
        GPT2,
        lambda document: {"name": "gpt2", **gpt2.gpt2_fields("this", document)},
        gpt2.TABLE,
    ),
    "Llama": (
        LLAMA,
        lambda document: {"name": "llama", **llama.text_fields("this", read_fields("this", document, llama.TEXT))},
        llama.TEXT,
    ),
    "Mllama": (MLLAMA, mllama.mllama_fields, mllama._CONFIG),
    **{
        f"Mllama's {key}": (
            MLLAMA[key],
            lambda document, key=key: mllama.mllama_fields({**MLLAMA, key: document}),
            table,
        )
        for key, table in (("text_config", mllama._TEXT), ("vision_config", mllama._VISION))
    },
    **{
        f"CLIPModel's {tower} tower": (
            CONFIG[f"{tower}_config"],
            lambda document, tower=tower: transformers.clip_fields({**CONFIG, f"{tower}_config": document}),
            table,
        )
        for tower, table in transformers._TOWERS.items()
    },
    "a preprocessor": (
        PREPROCESSOR,
        lambda document: transformers.clip_fields(CONFIG, document),
        transformers._PREPROCESSOR,
    ),
    **{
        name: (
            open_clip_document(fields),
            lambda document: open_clip.clip_fields(document.get("model_cfg"), document.get("preprocess_cfg")),
            open_clip._TABLE,
        )
        for name, fields in (("OpenCLIP", FIELDS), ("OpenCLIP's ResNet", RESNET))
    },
    "U-ViT": (
        UVIT_ARGUMENTS,
        uvit.uvit_fields,
        {argument: field for argument, _, field in uvit._ARGUMENTS} | uvit._OTHER_ARGUMENTS,
    ),
}
DOCUMENTS |= {
    "DiT": (
        dit.dit_arguments(DIT),
        dit.dit_fields,
        {argument: field for argument, _, field in dit._ARGUMENTS} | dit._OTHER_ARGUMENTS,
    ),
    "DiTTransformer2DModel": (
        diffusers_dit.dit_config(DIT.clone(last_period=True, mlp_norm_epsilon=1e-5)),
        diffusers_dit.dit_fields,
        diffusers_dit.TABLE,
    ),
}
ABSURD = (None, [], [1, 2, 3, 4, 5, 6, 7], "64", {"a": 1}, -7, 0, 2.5, 1e400, 10**40, True, [None])


def paths(table, prefix=()):
    for key, field in table.items():
        yield (*prefix, key), field
        if field.group is not None:
            yield from paths(field.group, (*prefix, key))


def changed(document, path, value):
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return document


KEYS = [
    (name, path, field)
    for name, (_, _, table) in DOCUMENTS.items()
    for path, field in paths(table)
    if field is not IDLE
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_document_itself_is_read(name):
    document, read, _ = DOCUMENTS[name]
    assert read(document)


@pytest.mark.parametrize(("name", "path", "field"), [pytest.param(*key, id=f"{key[0]} {key[1]}") for key in KEYS])
def test_any_value_of_any_key_is_read_or_refused_in_a_line_that_names_the_key(name, path, field):
    document, read, _ = DOCUMENTS[name]
    for value in ABSURD:
        try:
            read(changed(document, path, value))
        except UserError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 600
            # Two keys are for one tower, of which is said what is in it, or how it differs from the other one.
            tower = path[-1].partition("_config")[0] if "_config" in path[-1] else path[-1]
            assert tower in said or path[-1] == "name" or "the vision tower has" in said, said
        else:
            assert field.fits(value), f"{value!r} was read"


@pytest.mark.parametrize("name", ("UNet2DModel", "DDIMScheduler"))
def test_a_class_that_is_no_name(name):
    document, read, _ = DOCUMENTS[name]
    with pytest.raises(UserError, match=f"\\['{name}'\\]"):
        read({**document, "_class_name": [name]})


def test_a_key_that_no_table_has_is_refused_and_the_library_s_notes_are_not():
    for name, (document, read, _) in DOCUMENTS.items():
        with pytest.raises(UserError, match="qk_norm: not known here; .* give --ignore_keys=qk_norm"):
            read(changed(document, ("model_cfg",) * ("model_cfg" in document) + ("qk_norm",), "rms_norm"))
        assert read({**document, "_note": 1}), name


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (whole(low=2, high=5), (2, 5), (1, 6, 2.0, True, "3", None, [3])),
        (real(low=0, above=True), (0.1, 3), (0, -1.0, float("nan"), float("inf"), 10**400, True, "1", None)),
        (flag(), (True, False), (0, 1, None, "true")),
        (word(choices=("a", "b")), ("a",), ("c", None, ["a"], 1)),
        (fixed(3), (3, 3.0, [3, 3]), (True, "3", None, [], [3, 4])),
        (fixed(None), (None, False, "", []), (1, "x", [1])),
        (whole().or_null(), (None, 1), (0, "x")),
    ],
)
def test_a_field_says_what_fits(field, good, bad):
    for value in good:
        assert read_fields("it", {"key": value}, {"key": field}) == {"key": value}
    for value in bad:
        with pytest.raises(UserError, match="it cannot be converted: key is .*; it must be"):
            read_fields("it", {"key": value}, {"key": field})


@pytest.mark.parametrize("last", ["x", True])
def test_a_list_that_is_in_itself_over_and_over_is_refused_at_once(last):
    """A pickle or YAML of few bytes may hold more values than there is time to read."""
    value = [last]
    for _ in range(30):
        value = [value] * 9
    for document in (value, {"key": value}, {"key": {"inner": value}}):
        for field in (fixed(True), whole(), several(whole())):
            with pytest.raises(UserError, match=r"\[\[") as error:
                read_fields("it", document, {"key": field})
            assert len(str(error.value)) < 200


def test_a_number_that_python_does_not_write_is_refused():
    with pytest.raises(UserError, match="key is a huge number; it must be a whole number"):
        read_fields("it", {"key": 1 << 20_000}, {"key": whole()})


def test_lists_are_as_long_as_others_and_all_problems_stand_in_one_line():
    table = {
        "widths": several(whole(), (1, 2)),
        "depths": several(whole(), 1, length="widths", single=True),
        "pair": several(real(), (0.5, 0.5), length=2),
        "inner": group({"needed": whole(), "other": flag(False)}, {"needed": 1}),
    }
    filled = {"widths": (1, 2), "depths": 1, "pair": (0.5, 0.5), "inner": {"needed": 1, "other": False}}
    assert read_fields("it", {}, table) == filled
    wrong = {"widths": [1, 2, 3], "depths": [1, 2], "pair": [1], "inner": {"other": 1, "more": 2}}
    with pytest.raises(UserError) as error:
        read_fields("it", wrong, table)
    assert str(error.value) == (
        "it cannot be converted: depths has 2 entries, widths has 3; pair has 1 entries; it must have 2; "
        "there is no inner.needed; inner.other is 1; it must be true or false; "
        "inner.more: not known here; if the network does not depend on it, give --ignore_keys=more"
    )
    with pytest.raises(UserError, match="is described by 'x', which is not a JSON object"):
        read_fields("it", "x", table)


def test_what_a_network_cannot_be_built_with_is_one_line():
    for change in ({"groups": 3}, {"width": 0}, {"multipliers": ()}, {"heads": 0, "head_width": None}):
        with pytest.raises(UserError, match="this network cannot be built"):
            model_shapes(models.create_model(**{**ADM, **change}))
