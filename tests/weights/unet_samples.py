"""Tiny UNets of every published kind, for the tests of formats."""

_SHARED = {
    **{"name": "unet", "image_size": 8, "in_channels": 3, "out_channels": 3, "width": 8, "multipliers": (1, 2)},
    **{"attention_levels": (1,), "blocks": 1, "num_classes": 0, "time_width": 32, "sine_first": False},
    **{"last_period": False, "scale_shift": False, "resampler": "convolution", "downsample_padding": (1, 1)},
    **{"dropout": 0.0, "groups": 4, "norm_epsilon": 1e-5},
}
_TRANSFORMER = {
    **{**_SHARED, "attention": "transformer", "in_channels": 4, "out_channels": 4, "attention_levels": (0,)},
    **{"context_width": 6, "transformer_depth": 1, "linear_projection": False},
}
DDPM = {**_SHARED, "attention": "plain", "heads": 1, "sine_first": True, "last_period": True}
DDPM |= {"downsample_padding": (0, 1), "dropout": 0.1, "norm_epsilon": 1e-6}
ADM = {**_SHARED, "attention": "plain", "head_width": 4, "num_classes": 5, "scale_shift": True, "resampler": "residual"}
ADM |= {"out_channels": 6, "attention_levels": (0, 1)}
STABLE_DIFFUSION_1 = {**_TRANSFORMER, "heads": 2}
STABLE_DIFFUSION_2 = {**_TRANSFORMER, "head_width": 4, "linear_projection": True}
CLASSES = {**_TRANSFORMER, "heads": 1, "num_classes": 5, "transformer_depth": 2, "time_width": 20}
UNETS = {
    **{"DDPM": DDPM, "ADM": ADM, "stable diffusion 1": STABLE_DIFFUSION_1},
    **{"stable diffusion 2": STABLE_DIFFUSION_2, "classes": CLASSES},
}
