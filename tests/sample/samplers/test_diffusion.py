"""Sampling from a diffusion: whose picture is whose, guidance, compilation, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample.samplers.diffusion
import sample.samplers.diffusion_program
from cli.errors import UserError
from configs.paper import uvit
from configs.scenes import clip, ddpm_uvit
from configs.toy import swiss_roll
from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule
from sample.samplers import create_sampler
from sample.sheets.grid import to_uint8

TEXT = np.random.default_rng(0).integers(1, 20, (4, 12)).astype(np.int32)


def keys(count=4):
    return jax.random.split(jax.random.key(5), count)


@pytest.fixture(scope="module")
def drawer():
    """A sampler of captions with random parameters, and what it draws for a request."""
    config = ddpm_uvit.get_config("debug")
    with config.unlocked():
        config.models.denoiser.update({"width": 16, "heads": 2, "image_size": 8, "context_width": 16})
        config.models.text.update({"width": 16, "text_vocab_size": 20})
        config.sample.steps = 4
    sampler = create_sampler(config)
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sampler.model.example_inputs(1))
    text = sampler.text.model
    params = {
        "denoiser": jax.jit(sampler.model.init)(jax.random.key(0), *inputs)["params"],
        "text": jax.jit(text.init)(jax.random.key(1), jnp.asarray(TEXT[:1]))["params"],
    }
    leaves, structure = jax.tree.flatten(params)
    noise = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, noise, strict=True)]
    params = jax.tree.unflatten(structure, leaves)

    def draw(text=TEXT, which=None, moved=None, **settings):
        chosen = keys() if which is None else keys()[which]
        rows = text if which is None or text is None else text[which]
        return {
            name: np.asarray(value)
            for name, value in sampler(params, {}, {}, sampler.request(rows, **settings), chosen, moved).items()
        }

    return sampler, draw


def test_a_picture_depends_on_its_caption_and_key_alone(drawer):
    _, draw = drawer
    together = draw(sampler="ddpm", steps=6)["image"]
    alone = draw(which=np.array([2, 1]), sampler="ddpm", steps=6)["image"]
    assert together.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(alone, together[[2, 1]], atol=2e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_guidance_of_zero_ignores_the_caption_and_one_is_none(drawer):
    _, draw = drawer
    other = np.roll(TEXT, 1, axis=0)
    np.testing.assert_allclose(draw(guidance=0.0)["image"], draw(other, guidance=0.0)["image"], atol=1e-5)
    np.testing.assert_allclose(draw(guidance=1.0)["image"], draw(guidance=1.0001)["image"], atol=1e-3)
    assert np.abs(draw(guidance=1.0)["image"] - draw(other, guidance=1.0)["image"]).max() > 1e-2
    assert np.abs(draw(guidance=1.0)["image"] - draw(guidance=5.0)["image"]).max() > 1e-2


def test_a_negative_prompt_takes_the_blank_caption_s_place(drawer):
    _, draw = drawer
    plain = draw(guidance=3.0)["image"]
    np.testing.assert_array_equal(draw(guidance=3.0, negative=np.zeros_like(TEXT))["image"], plain)
    assert np.abs(draw(guidance=3.0, negative=np.roll(TEXT, 1, axis=0))["image"] - plain).max() > 1e-2
    # Leading away from the caption itself leaves nothing to follow.
    itself = draw(guidance=3.0, negative=TEXT)["image"]
    np.testing.assert_allclose(itself, draw(guidance=1.0)["image"], atol=1e-4)


def test_no_caption_is_the_blank_one(drawer):
    _, draw = drawer
    np.testing.assert_allclose(draw(None)["image"], draw(np.zeros_like(TEXT), guidance=1.0)["image"], atol=1e-4)


def test_prompts_seeds_and_guidance_compile_nothing_new(drawer):
    _, draw = drawer
    draw(guidance=3.0, negative=TEXT)
    before = sample.samplers.diffusion_program.draw._cache_size()
    draw(np.roll(TEXT, 1, axis=0), guidance=7.5, negative=TEXT, rescale=0.7, guidance_start=0.1, guidance_stop=0.9)
    assert sample.samplers.diffusion_program.draw._cache_size() == before
    draw(guidance=3.0, negative=TEXT, steps=5)
    assert sample.samplers.diffusion_program.draw._cache_size() == before + 1


def test_who_watches_the_steps_gets_the_same_pictures(drawer, monkeypatch):
    """To the bit, by programs that no number of steps at a time, prompt or guidance compiles anew."""
    _, draw = drawer
    programs = [getattr(sample.samplers.diffusion_program, name) for name in ("begin", "advance", "end")]
    monkeypatch.setattr(sample.samplers.diffusion, "BETWEEN", 0.0)
    picture = {"image": np.full((4, 8, 8, 3), 200, np.uint8), "mask": np.tri(8, dtype=bool)[None].repeat(4, axis=0)}
    for settings, expected in (
        ({"sampler": "ddpm", "steps": 6, "guidance": 1.5}, [1, 2, 3, 4, 5, 6]),
        ({"sampler": "unipc", "steps": 3, "guidance": 3.0, "negative": np.roll(TEXT, 2, axis=0)}, [1, 2, 3]),
        ({"sampler": "ddim", "steps": 4, "guidance": 3.0, "strength": 0.5, **picture}, [1, 2]),
    ):
        steps = []
        watched = draw(moved=steps.append, **settings)["image"]
        np.testing.assert_array_equal(watched, draw(**settings)["image"])
        assert steps == expected  # each takes longer than no time
        compiled = [program._cache_size() for program in programs]
        draw(np.roll(TEXT, 1, axis=0), moved=steps.append, **{**settings, "guidance": 2 * settings["guidance"]})
        assert [program._cache_size() for program in programs] == compiled
    monkeypatch.setattr(sample.samplers.diffusion, "BETWEEN", 1e9)
    steps = []
    draw(moved=steps.append, sampler="ddpm", steps=6, guidance=1.5)
    assert steps == [1, 6]
    draw(moved=steps.append, steps=3, trajectory=True)  # kept for the end
    assert steps == [1, 6]


def test_a_guided_step_is_one_call_on_both_halves(drawer, monkeypatch):
    sampler, _ = drawer
    sizes, apply = [], type(sampler.model).apply

    def counting(model, tree, x, *arguments):
        sizes.append(len(x))
        return apply(model, tree, x, *arguments)

    monkeypatch.setattr(type(sampler.model), "apply", counting)
    request = sampler.request(TEXT, guidance=3.0)
    arrays = {key: value for key, value in request.items() if key not in ("steps", "trajectory")}
    trees = jax.eval_shape(
        lambda: {
            "denoiser": sampler.model.init(
                jax.random.key(0),
                *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sampler.model.example_inputs(1)),
            )["params"],
            "text": sampler.text.model.init(jax.random.key(0), jnp.asarray(TEXT))["params"],
        }
    )
    draw = sample.samplers.diffusion_program.draw.__wrapped__
    jax.eval_shape(functools.partial(draw, sampler, request["steps"], 1.0, True, ""), trees, {}, arrays, keys())
    assert sizes == [8]


def test_a_trajectory_ends_in_the_picture(drawer):
    _, draw = drawer
    outputs = draw(trajectory=True, sampler="ddim", steps=5)
    assert outputs["states"].shape == outputs["estimates"].shape == (4, 5, 8, 8, 3)
    # The last step of DDIM goes to the last estimate.
    np.testing.assert_allclose(outputs["estimates"][:, -1], outputs["image"], atol=1e-5)
    np.testing.assert_array_equal(outputs["image"], draw(sampler="ddim", steps=5)["image"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1.0}, "temperature: no such sampling option; choose from sampler, steps"),
        ({"guidance": float("nan")}, "guidance=nan is impossible"),
        ({"rescale": 2.0}, "rescale=2.0 is impossible"),
        ({"sampler": "lms"}, "unknown sampler 'lms'"),
        ({"steps": 0}, "0 steps are not between 1"),
        ({"spacing": "log"}, "unknown spacing 'log'"),
        ({"guided_channels": 4}, "guided_channels=4 is impossible: the data have 3 channels"),
        ({"label": np.zeros(4, np.int32)}, "this run takes no classes"),
    ],
)
def test_what_is_impossible_is_refused(drawer, settings, message):
    sampler, _ = drawer
    with pytest.raises(UserError, match=message):
        sampler.request(TEXT, **settings)


PICTURES = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("solver", ["ddpm", "dpm_solver_multistep"])
def test_a_picture_changes_as_much_as_strength_says(drawer, solver):
    sampler, draw = drawer
    picture = PICTURES / np.float32(127.5) - 1
    settings = {"sampler": solver, "steps": 5}
    untouched = draw(image=PICTURES, strength=0.0, **settings)["image"]
    np.testing.assert_array_equal(to_uint8(untouched), PICTURES)
    np.testing.assert_array_equal(draw(image=PICTURES, strength=1.0, **settings)["image"], draw(**settings)["image"])
    # Between, it begins with the picture under the noise of one of the sampler's times: here the last three steps.
    outputs = draw(image=PICTURES, strength=0.5, trajectory=True, **settings)
    plan = sampler.plan(sampler.request(TEXT, **settings)["steps"])
    assert outputs["states"].shape[1] == 3
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 3)))(keys())
    np.testing.assert_allclose(outputs["states"][:, 0], plan.alpha[2] * picture + plan.sigma[2] * noise, atol=1e-5)
    assert np.abs(outputs["image"] - picture).max() > 0.1


@pytest.mark.parametrize("solver", ["ddpm", "dpm_solver_multistep"])
def test_what_a_mask_does_not_say_stays(drawer, solver):
    sampler, draw = drawer
    picture, mask = PICTURES / np.float32(127.5) - 1, np.zeros((4, 8, 8), bool)
    mask[:, 3:, 2:7] = True
    settings = {"sampler": solver, "steps": 6, "mask": mask, "trajectory": True}
    outputs = draw(image=PICTURES, **settings)
    np.testing.assert_array_equal(to_uint8(outputs["image"])[~mask], PICTURES[~mask])
    assert np.abs(outputs["image"] - picture)[mask].mean() > 0.1
    # What is drawn depends on what is known, and not on what is masked.
    other = PICTURES.copy()
    other[mask] = 0
    np.testing.assert_array_equal(draw(image=other, **settings)["image"], outputs["image"])
    other = PICTURES.copy()
    other[~mask] = 0
    assert np.abs(draw(image=other, **settings)["image"] - outputs["image"])[mask].max() > 1e-2
    if solver == "ddpm":
        return
    # Without noise of its own, a solver takes what is known along the noise that it began with.
    plan = sampler.plan(sampler.request(TEXT, sampler=solver, steps=6)["steps"])
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 3)))(keys())
    for step in range(6):
        expected = plan.alpha[step] * picture + plan.sigma[step] * noise
        np.testing.assert_allclose(outputs["states"][:, step][~mask], expected[~mask], atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0.5}, "strength is of a picture to change; give one, --image=FILE"),
        ({"mask": np.ones((4, 8, 8), bool)}, "mask is of a picture to change"),
        ({"image": PICTURES, "strength": 1.5}, "strength=1.5 is impossible; use 0"),
        ({"image": PICTURES[:, :4]}, "pictures are 4 x 8 pixels, this run's are 8 x 8 pixels"),
        ({"image": PICTURES, "mask": np.ones((4, 8, 8), bool), "strength": 0.0}, "mask has no effect with strength 0"),
        ({"image": PICTURES, "mask": np.zeros((4, 8, 8), bool)}, "the mask is black all over"),
    ],
    ids=["strength alone", "mask alone", "impossible strength", "another size", "mask and strength 0", "black mask"],
)
def test_pictures_and_masks_go_together(drawer, given, message):
    with pytest.raises(UserError, match=message):
        drawer[0].request(TEXT, **given)


def test_a_weaker_network_guides_instead_of_none(drawer):
    """Autoguidance: D_0 + w (D_1 - D_0), both told the caption; a sample of one step is that estimate."""
    sampler, _ = drawer
    sampler = dataclasses.replace(sampler, process=dataclasses.replace(sampler.process, clip=False))
    guided = sampler.guided_by(sampler)
    shapes = jax.eval_shape(init_of(sampler), jax.random.key(0))

    def params(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)

    strong, weak = params(0), params(1)
    settings = {"sampler": "ddim", "steps": 1}
    frozen = {"guide": {"params": weak, "frozen": {}}}

    def draw(sampler, params, frozen, **more):
        return np.asarray(sampler(params, {}, frozen, sampler.request(TEXT, **settings, **more), keys())["image"])

    alone = [draw(sampler, one, {}, guidance=1.0) for one in (strong, weak)]
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    np.testing.assert_allclose(
        draw(guided, strong, frozen, guidance=3.0), alone[1] + 3.0 * (alone[0] - alone[1]), atol=1e-4
    )
    np.testing.assert_array_equal(draw(guided, strong, frozen, guidance=1.0), alone[0])
    with pytest.raises(UserError, match="guidance leads away from the --guide_run"):
        guided.request(TEXT, negative=TEXT)
    shorter = dataclasses.replace(sampler.text, blank=sampler.text.blank[1:])
    with pytest.raises(UserError, match="the --guide_run is of another caption length than the run: 11, not 12"):
        guided.guided_by(dataclasses.replace(sampler, text=shorter))
    with pytest.raises(UserError, match="the --guide_run is of another process"):
        guided.guided_by(dataclasses.replace(sampler, process=Process(DiscreteSchedule(steps=7))))


def init_of(sampler):
    """Makes the parameters of a sampler's networks."""

    def init(key):
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sampler.model.example_inputs(1))
        text = sampler.text.model.init(key, jnp.asarray(TEXT[:1]))["params"]
        return {"denoiser": sampler.model.init(key, *inputs)["params"], "text": text}

    return init


def test_a_run_without_conditions_refuses_them():
    sampler = create_sampler(swiss_roll.get_config("debug"))
    with pytest.raises(UserError, match="takes no captions"):
        sampler.request(TEXT)
    with pytest.raises(UserError, match="nothing to guide"):
        sampler.request(guidance=2.0)


def test_classes_are_checked_and_the_last_stands_for_none():
    config = ddpm_uvit.get_config("debug")
    with config.unlocked():
        del config.models.text
        config.models.denoiser.update({"num_classes": 5, "context_length": 0, "context_width": 0})
    sampler = create_sampler(config)
    assert sampler.null_label == 4
    assert sampler.request(label=np.array([0, 3]))["label"].dtype == np.int32
    with pytest.raises(UserError, match="classes are 0 to 4, the last for none"):
        sampler.request(label=np.array([5]))


def test_a_run_that_never_dropped_its_classes_needs_one_and_cannot_be_guided():
    sampler = create_sampler(uvit.get_config("imagenet64_m"))
    assert sampler.null_label is None
    sampler.request(label=np.array([999]))
    with pytest.raises(UserError, match="needs a class, 0 to 999"):
        sampler.request()
    with pytest.raises(UserError, match="never trained without its class"):
        sampler.request(label=np.array([1]), guidance=2.0)


def test_captions_may_be_read_by_a_frozen_clip():
    config = ddpm_uvit.get_config("debug")
    clip_config = clip.get_config("debug")
    with config.unlocked():
        del config.models.text
        config.frozen.clip = clip_config.models.clip
        length, width = clip_config.models.clip.text_length, clip_config.models.clip.text_width
        config.models.denoiser.update({"context_length": length, "context_width": width})
        config.sample.guidance = 3.0
    sampler = create_sampler(config)
    reader, end = sampler.text.model, sampler.text.model.text_end_id
    assert sampler.text.blank[:3] == (end - 1, end, 0)  # the empty caption between its ends
    inputs = [jnp.zeros(x.shape, x.dtype) for x in reader.example_inputs(1)]
    frozen = {"clip": {"params": jax.jit(reader.init)(jax.random.key(0), *inputs)["params"], "variables": {}}}
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sampler.model.example_inputs(1))
    params = {"denoiser": jax.jit(sampler.model.init)(jax.random.key(1), *inputs)["params"]}
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    text = np.zeros((2, length), np.int32)
    text[:, :3] = [[end - 1, 7, end], [end - 1, 9, end]]
    same = jnp.stack([jax.random.key(0)] * 2)
    images = np.asarray(sampler(params, {}, frozen, sampler.request(text), same)["image"])
    assert np.abs(images[0] - images[1]).max() > 1e-4  # the captions alone differ
    blank = np.array([sampler.text.blank] * 2)
    untold = np.asarray(sampler(params, {}, frozen, sampler.request(None), same)["image"])
    np.testing.assert_allclose(
        np.asarray(sampler(params, {}, frozen, sampler.request(blank), same)["image"]), untold, atol=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"sampler": "ddim", "end": "first"}, set()),
        ({"sampler": "ddpm", "end": "first"}, {"end"}),
        ({"sampler": "ddim", "offset": 1, "spacing": "leading"}, set()),
        ({"sampler": "ddim", "offset": 1, "times": "published", "end": "first", "steps": 1}, set()),
        ({"sampler": "ddim", "offset": 1, "spacing": "trailing"}, {"offset"}),
    ],
)
def test_settings_of_times_that_a_solver_has_no_use_for_are_known(drawer, settings, unread):
    assert drawer[0].idle((), {"steps": 5, **settings}).keys() == unread
