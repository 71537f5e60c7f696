"""What UniDiffuser's network is asked in each mode, and samples of a pair of Gaussians against their distribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from configs.scenes import unidiffuser
from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule
from diffusion.solver_choice import make_plan
from models.unidiffuser import PictureAndText, UniDiffuser
from sample.first_stage import FirstStage
from sample.samplers import create_sampler
from sample.samplers.given_picture import GivenPicture
from sample.samplers.unidiffuser import UniDiffuserSampler
from sample.samplers.unidiffuser_modes import MODES, draw_latents, drawn_names, made_of, normal_latents, predict
from sample.samplers.unidiffuser_settings import Scales

SHAPES = {"image": (1, 1, 1), "clip": (1,), "text": (1, 1)}
PROCESS = Process(DiscreteSchedule("scaled_linear", 1000, 8.5e-4, 0.012), time_shift=1)
LAST = 1000.0

# What stands in a call: x, the state that is drawn; g, what is given; f, fresh noise; 0, the blank caption. Picture,
# caption, and their times.
T = 321.5
CALLS = {
    "text_to_image": [("x", "g", T, 0.0), ("x", "f", T, LAST)],
    "image_to_text": [("g", "x", 0.0, T), ("f", "x", LAST, T)],
    "joint": [("x", "x", T, T), ("x", "f", T, LAST), ("f", "x", LAST, T)],
    "image": [("x", "f", T, LAST)],
    "text": [("f", "x", LAST, T)],
}
# Which of the calls guidance leads away from.
AWAY = {
    "text_to_image": {"image": 1, "clip": 1},
    "image_to_text": {"text": 1},
    "joint": {"image": 1, "clip": 1, "text": 2},
}
NUMBERS = {"x": 1.0, "g": 2.0, "f": 3.0, "0": 4.0}


def marked(mark, names=tuple(SHAPES), count=2):
    return {name: jnp.full((count, *SHAPES[name]), NUMBERS[mark]) for name in names}


class Recorder:
    """A network whose outputs are different numbers of all that it is told, and which remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t_image, t_text):
        self.calls.append((x, t_image, t_text))
        told = x.image[:, 0, 0, 0] + 10 * x.text[:, 0, 0] + 0.01 * t_image + 0.001 * t_text
        image, clip, text = (told * factor for factor in (1.0, 2.0, 3.0))
        return PictureAndText(image[:, None, None, None], clip[:, None], text[:, None, None])


def value(call, name):
    picture, caption, t_image, t_text = call
    told = NUMBERS[picture] + 10 * NUMBERS[caption] + 0.01 * t_image + 0.001 * t_text
    return told * {"image": 1.0, "clip": 2.0, "text": 3.0}[name]


@pytest.mark.parametrize("guidance", [None, 0.0, 1.0, 8.0])
@pytest.mark.parametrize("mode", CALLS)
def test_each_mode_asks_what_the_paper_says_in_one_call(mode, guidance):
    network, names = Recorder(), drawn_names(mode)
    told = marked("g", [name for name in SHAPES if name not in names])
    out = predict(network, mode, marked("x", names), jnp.full(2, T), LAST, told, marked("f"), guidance)
    ((x, t_image, t_text),) = network.calls
    asked = list(zip(*(np.ravel(each) for each in (x.image, x.clip, x.text, t_image, t_text)), strict=True))
    calls = CALLS[mode] if guidance is not None else CALLS[mode][:1]
    wanted = [(NUMBERS[call[0]], NUMBERS[call[0]], NUMBERS[call[1]], *call[2:]) for call in calls]
    assert asked == wanted * 2  # an example's rows stand together
    assert set(out) == set(names)
    for name, given in out.items():
        cond = value(calls[0], name)
        away = value(calls[AWAY.get(mode, {}).get(name, 0)], name) if guidance is not None else cond
        weight = 1.0 if guidance is None else guidance
        np.testing.assert_allclose(given, away + weight * (cond - away), rtol=1e-5)


def test_a_picture_may_be_led_away_from_the_blank_caption():
    network, empty = Recorder(), marked("0", ["text"])["text"]
    t = jnp.full(2, T)
    out = predict(network, "text_to_image", marked("x", ["image", "clip"]), t, LAST, marked("g"), {}, 3.0, empty)
    cond, away = (value(call, "clip") for call in (("x", "g", T, 0.0), ("x", "0", T, 0.0)))
    np.testing.assert_allclose(out["clip"], away + 3 * (cond - away), rtol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_noise_of_a_side_that_says_nothing_is_drawn_anew_at_every_time_unless_it_is_kept(kept):
    network, keys = Recorder(), jax.random.split(jax.random.key(0), 2)
    plan = make_plan(PROCESS.schedule, "dpm_solver_singlestep", 4, spacing="time")
    first = normal_latents(keys, {name: SHAPES[name] for name in ("image", "clip")})
    held = normal_latents(keys, SHAPES) if kept else None
    with jax.disable_jit():
        draw_latents(network, PROCESS, plan, "image", first, {}, keys, kept=held, shapes=SHAPES)
    times = [float(t_image[0]) for _, t_image, _ in network.calls]
    np.testing.assert_allclose(times, [1000, 750.25, 500.5, 250.75], rtol=1e-6)
    assert all(float(t_text[0]) == LAST for _, _, t_text in network.calls)
    texts = np.stack([np.ravel(x.text) for x, _, _ in network.calls])
    assert len(np.unique(texts)) == (2 if kept else 8)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("solver", ["dpm_solver_singlestep", "ddpm"])
def test_a_picture_is_changed_from_its_own_noisy_state_and_what_is_known_of_it_stays(solver, strength):
    """Of two examples the first one's latent is known; embeddings never are."""
    network, keys = Recorder(), jax.random.split(jax.random.key(0), 2)
    plan = make_plan(PROCESS.schedule, solver, 4, spacing="time", strength=strength)
    first = normal_latents(keys, {name: SHAPES[name] for name in ("image", "clip")})
    data = {"image": jnp.full((2, 1, 1, 1), 0.7), "clip": jnp.full((2, 1), -0.4)}
    known = {"image": jnp.array([True, False]).reshape(2, 1, 1, 1), "clip": jnp.zeros((2, 1), bool)}
    given = GivenPicture(data, known, strength)
    with jax.disable_jit():
        out = draw_latents(network, PROCESS, plan, "image", first, {}, keys, shapes=SHAPES, given=given)
    states = [x for x, _, _ in network.calls]
    assert len(states) == 4 * strength
    noisy = {name: plan.alpha[0] * data[name] + plan.sigma[0] * first[name] for name in data}
    begun = noisy if strength < 1 else {name: plan.first_scale * first[name] for name in data}
    np.testing.assert_allclose(states[0].image[0], noisy["image"][0], rtol=1e-5)
    np.testing.assert_allclose(states[0].image[1], begun["image"][1], rtol=1e-5)
    np.testing.assert_allclose(states[0].clip, begun["clip"], rtol=1e-5)
    np.testing.assert_array_equal(out["image"][0], data["image"][0])
    assert abs(out["image"][1] - data["image"][1]) > 1e-2 and np.abs(out["clip"] - data["clip"]).min() > 1e-2
    if strength == 1:  # as fresh as without a picture, unless something is known of it
        with jax.disable_jit():
            draws = [
                draw_latents(Recorder(), PROCESS, plan, "image", first, {}, keys, shapes=SHAPES, given=one)
                for one in (None, GivenPicture(data, None, 1.0))
            ]
        jax.tree.map(np.testing.assert_array_equal, *draws)
    if solver == "dpm_solver_singlestep":  # draws no noise of its own
        for state, alpha, sigma in zip(states, plan.alpha, plan.sigma, strict=True):
            np.testing.assert_allclose(state.image[0], alpha * 0.7 + sigma * first["image"][0], atol=1e-5)


def test_fifty_steps_are_at_the_authors_times():
    plan = make_plan(PROCESS.schedule, "dpm_solver_singlestep", 50, spacing="time")
    np.testing.assert_allclose(plan.t + 1, 1000 - 19.98 * np.arange(50))
    log_snr = np.log(plan.alpha[0] / plan.sigma[0])
    np.testing.assert_allclose(log_snr, -2.68202, atol=1e-5)


# A chain that ends in noise alone: samplers start from noise of mean 0, also where 7 % of the data are left.
LONG = Process(DiscreteSchedule("linear"), time_shift=1)
# A pair: a picture of two numbers, latents and embedding, and a caption of one.
MEAN = np.array([0.3, -0.2, 0.5])
COVARIANCE = np.array([[1.0, 0.4, 0.7], [0.4, 0.8, 0.2], [0.7, 0.2, 1.1]])


def optimal(x, t_image, t_text):
    """The expected noise in a noisy pair."""
    schedule, states = LONG.schedule, jnp.stack([x.image[:, 0, 0, 0], x.clip[:, 0], x.text[:, 0, 0]], axis=1)
    times = jnp.stack([t_image, t_image, t_text], axis=1)
    clean, step = times == 0, jnp.maximum(times - 1, 0)
    alpha, sigma = jnp.where(clean, 1.0, schedule.alpha(step)), jnp.where(clean, 0.0, schedule.sigma(step))
    covariance = alpha[:, :, None] * COVARIANCE * alpha[:, None] + jnp.eye(3) * (sigma**2)[:, None]
    eps = sigma * jnp.linalg.solve(covariance, (states - alpha * MEAN)[..., None])[..., 0]
    return PictureAndText(eps[:, 0, None, None, None], eps[:, 1, None], eps[:, 2, None, None])


@functools.partial(jax.jit, static_argnums=0)
def drawn(mode, keys, told, guidance=None):
    plan = make_plan(LONG.schedule, "dpm_solver_singlestep", 100, spacing="time")
    first = normal_latents(keys, {name: SHAPES[name] for name in drawn_names(mode)})
    out = draw_latents(optimal, LONG, plan, mode, first, told, jax.random.split(keys[0], len(keys)), guidance,
                       shapes=SHAPES)  # fmt: skip
    return jnp.stack([out[name].reshape(-1) for name in ("image", "clip", "text") if name in out], axis=1)


def given_caption(number, count):
    return {"text": jnp.full((count, 1, 1), number)}


@pytest.mark.parametrize("mode", CALLS)
def test_samples_of_a_gaussian_pair_have_its_joint_conditional_or_marginal_distribution(mode):
    count = 8192
    keys = jax.random.split(jax.random.key(1), count)
    told, mean, covariance = {}, MEAN, COVARIANCE
    of = {"image": [0, 1], "text_to_image": [0, 1], "text": [2], "image_to_text": [2]}.get(mode, [0, 1, 2])
    mean, covariance = MEAN[of], COVARIANCE[np.ix_(of, of)]
    if mode in ("text_to_image", "image_to_text"):
        rest = [i for i in range(3) if i not in of]
        values = np.array([1.4, -0.9, 1.6])[rest]
        told = given_caption(1.6, count)
        if mode == "image_to_text":
            told = {"image": jnp.full((count, 1, 1, 1), 1.4), "clip": jnp.full((count, 1), -0.9)}
        gain = COVARIANCE[np.ix_(of, rest)] @ np.linalg.inv(COVARIANCE[np.ix_(rest, rest)])
        mean = mean + gain @ (values - MEAN[rest])
        covariance = covariance - gain @ COVARIANCE[np.ix_(rest, of)]
    samples = np.asarray(drawn(mode, keys, told))
    np.testing.assert_allclose(samples.mean(axis=0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(samples.T).reshape(covariance.shape), covariance, atol=0.06)


def test_guidance_one_is_none_and_guidance_zero_ignores_what_is_given():
    keys = jax.random.split(jax.random.key(2), 64)
    plain, one = (drawn("text_to_image", keys, given_caption(1.6, 64), *weight) for weight in ((), (1.0,)))
    np.testing.assert_allclose(one, plain, atol=1e-5)
    ignored = drawn("text_to_image", keys, given_caption(1.6, 64), 0.0)
    np.testing.assert_allclose(ignored, drawn("text_to_image", keys, given_caption(-2.0, 64), 0.0), atol=1e-5)
    np.testing.assert_allclose(ignored, drawn("image", keys, {}), atol=1e-5)


class Optimal(UniDiffuser):
    """The optimal network of the pair, without parameters."""

    def apply(self, variables, x, t_image, t_text, data_type):
        return optimal(x, t_image, t_text)


class Same(FirstStage):
    """Latents are pictures."""

    def decode(self, frozen, z):
        return z


def coded(bytes_or_ids):
    return (jnp.asarray(bytes_or_ids, jnp.float32) - 128) / 50


class PairSampler(UniDiffuserSampler):
    """The sampler of the pair: a picture's first pixel holds its two numbers, a caption's first word its one."""

    @property
    def shapes(self):
        return SHAPES

    def encode_text(self, frozen, text):
        return {"text": coded(text[:, 1])[:, None, None]}

    def encode_image(self, frozen, images, keys):
        return {"image": coded(images[:, :1, :1, :1]), "clip": coded(images[:, 0, 0, 1:2])}

    def write(self, frozen, latents, program, numbers, keys):
        return latents["text"]


@functools.cache
def pair_sampler():
    sampler = create_sampler(unidiffuser.get_config("debug"))
    parts = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
    sizes = {field.name for field in dataclasses.fields(sampler.model)} - {"parent", "name"}
    parts["model"] = Optimal(**{name: getattr(sampler.model, name) for name in sizes})
    parts |= {"process": LONG, "first_stage": Same(sampler.first_stage.model), "scales": Scales()}
    return PairSampler(**parts)


IMAGE, CAPTION = (198, 83), 208  # 1.4 and -0.9, and 1.6


def called(mode, count, caption=CAPTION, **settings):
    """{"image": [count], "text": [count]}, those of them that a call of the sampler makes."""
    sampler, told = pair_sampler(), {}
    if MODES[mode] == "text":
        told = {"text": np.tile(np.array([351, caption, 352], np.int32), (count, 1))}
    elif MODES[mode] == "image":
        pixels = np.zeros((1, 32, 32, 3), np.uint8)
        pixels[0, 0, 0, :2] = IMAGE
        told = {"image": np.broadcast_to(pixels, (count, 32, 32, 3))}
    request = sampler.request(**told, mode=mode, **settings)
    outputs = sampler({"unidiffuser": {}}, {}, {}, request, jax.random.split(jax.random.key(3), count))
    return {name: np.asarray(value).reshape(count) for name, value in outputs.items()}


def regression(of, on):
    """(how the expectation of some numbers follows others, what variance is left)."""
    gain = COVARIANCE[np.ix_(of, on)] @ np.linalg.inv(COVARIANCE[np.ix_(on, on)])
    return gain, COVARIANCE[np.ix_(of, of)] - gain @ COVARIANCE[np.ix_(on, of)]


@pytest.mark.parametrize("mode", ["image_variation", "text_variation"])
def test_variations_of_a_gaussian_pair_are_drawn_by_way_of_the_other_side(mode):
    first, second, given = ([2], [0, 1], [1.4, -0.9]) if mode == "image_variation" else ([0, 1], [2], [1.6])
    (gain, left), (back, rest) = regression(first, second), regression(second, first)
    shift = gain @ (np.array(given) - MEAN[second])  # of the side between, from which the given one's copy is drawn
    mean, covariance = np.zeros(3), np.zeros((3, 3))
    mean[first], mean[second] = MEAN[first] + shift, MEAN[second] + back @ shift
    covariance[np.ix_(first, first)], covariance[np.ix_(second, second)] = left, rest + back @ left @ back.T
    covariance[np.ix_(second, first)] = back @ left
    covariance[np.ix_(first, second)] = (back @ left).T
    out = called(mode, 8192, steps=100, guidance=1.0)
    samples = np.stack([out["image"], out["text"]], axis=1)
    np.testing.assert_allclose(samples.mean(axis=0), mean[[0, 2]], atol=0.05)
    np.testing.assert_allclose(np.cov(samples.T), covariance[np.ix_([0, 2], [0, 2])], atol=0.06)


@pytest.mark.parametrize("mode", ["text_to_image", "image_to_text", "joint"])
def test_of_a_call_guidance_one_is_none_and_guidance_zero_draws_each_side_alone(mode):
    plain = called(mode, 64, steps=20, guidance=1.0)
    one = called(mode, 64, steps=20, guidance=np.nextafter(np.float32(1), np.float32(2)))  # by the guided program
    zero = called(mode, 64, steps=20, guidance=0.0)
    for name in plain:
        np.testing.assert_allclose(one[name], plain[name], atol=1e-4)
        alone = called(name, 64, steps=20, guidance=1.0)[name]  # modes are named as what they draw
        np.testing.assert_allclose(zero[name], alone, atol=1e-5)
        assert np.abs(plain[name] - alone).max() > 0.1


CAPTIONS = {"temperature", "top_k", "top_p", "beams", "length_penalty", "caption_length"}
IDLE = {
    "text_to_image": {*CAPTIONS, "noise"},
    "image_to_text": {"unconditional"},
    "joint": {"unconditional"},
    "image": {*CAPTIONS, "unconditional", "guidance"},
    "text": {"unconditional", "guidance"},
    "image_variation": set(),
    "text_variation": set(),
}


@pytest.mark.parametrize("mode", MODES)
def test_settings_that_a_mode_does_not_read_are_known(mode):
    sampler, told = pair_sampler(), [row for row in (MODES[mode],) if row is not None]
    always = {"data_type"}  # of which this network knows no kinds
    assert set(sampler.idle(told, {"mode": mode, "guidance": 2.0})) == IDLE[mode] | always
    unguided = set(sampler.idle(told, {"mode": mode, "guidance": 1.0}))
    assert unguided == IDLE[mode] - {"guidance"} | {"unconditional"} | always
    with pytest.raises(UserError, match=f"mode {mode} reads"):
        sampler.idle(("text", "image"), {"mode": mode})


def test_what_is_made_of_what_is_known():
    sampler = pair_sampler()
    assert set(sampler.idle(("text", "image"), {"guidance": 2.0})) == {"data_type"}
    assert sampler.made_of({"modes": ("text_to_image", "image_to_text")}) == {"image": "given", "text": "given"}
    made = {mode: made_of(mode) for mode in MODES}
    assert made.pop("image_variation") == {"text": "given", "image": "made"}
    assert made.pop("text_variation") == {"image": "given", "text": "made"}
    assert made.pop("text_to_image") == {"image": "given"} and made.pop("image_to_text") == {"text": "given"}
    assert not any(made.values())
