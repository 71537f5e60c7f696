"""How a diffusion makes a picture: what the network saw on the way, and what it took the picture to be."""

import dataclasses

import numpy as np
from PIL import Image

from cli.errors import UserError
from sample.command import Drawn
from sample.conditions import Order, draw_outputs, order_rows, refuse_unread
from sample.samplers.diffusion import DiffusionSampler
from sample.sheets.grid import draw_mosaic, draw_table, to_uint8
from sample.trained import TrainedSampler

_CHUNK = 8  # pictures drawn at once: all steps of each are kept


def draw_trajectory(trained: TrainedSampler, order: Order, num: int, moments: int) -> Drawn:
    """Draws pictures with two rows for each: the states x_t from noise to the sample, and the estimates of x_0 below.

    Columns are evenly spaced over the sampler's steps, the last is the sample. States are divided by the standard
    deviation that they have at their time if that exceeds 1, so that samplers whose noise grows on unscaled data can be
    seen too. Drawn in smaller chunks than elsewhere, so equal to pictures drawn without it to float rounding.

    Args:
      trained: a diffusion of pictures.
      order: what.
      num: pictures of each condition.
      moments: columns; at most one for each step and one for the sample.

    Raises:
      UserError: if the run is no diffusion, the order is impossible or there are fewer than 2 columns.
    """
    sampler = trained.sampler
    if not isinstance(sampler, DiffusionSampler) or "image" not in sampler.makes:
        raise UserError(
            f"{trained.run.folder} is a run of {trained.config.objective} and makes {' and '.join(sampler.makes)}; "
            "--trajectory is for diffusions of pictures"
        )
    if moments < 2:
        raise UserError(f"--trajectory={moments} must be at least 2: noise and the sample")
    rows = order_rows(trained, order)
    request = sampler.request(**rows, **order.settings)
    if request["strength"] == 0:
        raise UserError("strength 0 runs no step that could be shown; choose more")
    refuse_unread(trained, order)
    outputs = draw_outputs(dataclasses.replace(trained, chunk=_CHUNK), order, rows, num, trajectory=True)
    plan = sampler.plan(request["steps"], request["strength"])
    states = outputs["states"]
    if sampler.first_stage is None:  # of latents they are divided before they are decoded
        states = states / plan.state_scales[:, None, None, None]
    states = to_uint8(states)
    estimates, images = to_uint8(outputs["estimates"]), to_uint8(outputs["image"])
    places = np.unique(np.rint(np.linspace(0, plan.evaluations, moments)).astype(int))[:-1]
    cells: list[list[Image.Image | None]] = []
    headers: list[str] = []
    records = order.records(num)
    conditions = [condition for condition in order.conditions for _ in range(num)]
    for picture, (condition, record) in enumerate(zip(conditions, records, strict=True)):
        last = draw_mosaic(images[picture][None], columns=1, min_side=96)
        for kind, end in ((states, last), (estimates, None)):
            shown = [draw_mosaic(kind[picture, place][None], columns=1, min_side=96) for place in places]
            cells.append([*shown, end])
        name = f"{condition}, picture {record['index']}" if str(condition) else f"picture {record['index']}"
        headers += [f"{name}: x_t", "estimate of x_0"]
    columns = [f"step {place} t={float(plan.t[place]):.4g}" for place in places] + ["sample"]
    table = draw_table(cells, rows=headers, columns=columns)
    return Drawn(images, None, records, order.describe(trained), table)
