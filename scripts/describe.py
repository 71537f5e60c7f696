"""`python -m scripts.describe --config=FILE | --run=FOLDER`: what a config would build, without allocating it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cli import entry_point
from cli.config import config_file, load_config
from cli.errors import UserError
from cli.locations import explain, locate, make_folder, write_whole

_DESCRIPTION = """\
Shows the networks of an experiment, what each is for, and their modules in the order in which data pass them: name,
parameters, matrix FLOPs, role. Equal modules beside each other are one line, "64 x blocks_0 ... blocks_63", with the
figures of each. Then matrix FLOPs of a training step, the optimizer's among them and nothing twice. Nothing is
allocated, so the largest config can be described on a laptop.

FLOPs of a module are multiplications and additions of its matrix products and convolutions (a multiply-add is two) in
one forward call of its network, for one example of the run's size: one step of a diffusion without guidance, encoder
and decoder of a first stage both, a whole caption.

--figure=FILE.svg draws the same as a map: a box for each part of a network (levels of a UNet with their resolutions,
layers of a stack), arrows where one reads what another makes, as found in the traced program.

  --config=FILE[:ARGUMENT]   the config; --config.KEY=VALUE overrides a key
  --run=FOLDER               in its place: a run folder, also one of converted weights
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and describes."""
    parser = entry_point.parser("scripts.describe", _DESCRIPTION)
    parser.add_argument("--run", default="", help="a run folder, whose config is described")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--depth", type=int, default=2, help="levels of the module tree (default 2)")
    parser.add_argument("--figure", default="", metavar="FILE", help="also draw the map of the networks, an SVG file")
    options, rest = parser.parse_known_args(arguments)
    figure = locate(options.figure) if options.figure else None
    if figure is not None and figure.suffix.lower() != ".svg":
        raise UserError(f"--figure={options.figure} is an SVG file; end its name in .svg")
    if options.run and rest:
        raise UserError(f"{rest[0]} cannot be given with --run, whose config is described; leave one of them out")
    config = resolved_config(options.run) if options.run else load_config(rest)
    description = describe_run(options.run, options.depth) if options.run else describe(config, options.depth)
    if figure is not None:
        try:
            make_folder(figure.parent)
            write_whole(figure, draw_figure(config, options.run or config_file(rest)))
        except OSError as error:
            raise explain(error) or UserError(f"cannot write {figure}: {error}") from error
    print(json.dumps(description, indent=2) if options.json else format_description(description))


def describe(config: Any, depth: int) -> dict[str, Any]:
    """Returns parameters of each trained and frozen part by module, and FLOPs of a step, as `scripts.benchmark` counts.

    A trained part's "held" are those of its parameters that are not trained.

    Args:
      config: an experiment; a frozen stage whose run is missing is described from the config itself.
      depth: levels of the module tree.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cost.flops import matrix_flops, plain_config
    from train.objectives import create_objective
    from train.optimizer import create_optimizer
    from train.precomputed import example_spec
    from train.trainable import count_parameters, trained_params, trained_patterns
    from weights.run import overlay
    from weights.sources import abstract_frozen

    config = plain_config(config, recompute=False)  # as scripts.benchmark counts a step
    objective = create_objective(config)
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
        for name, (shape, dtype) in example_spec(config).items()
    }
    rng = jax.eval_shape(lambda: jax.random.key(0))
    params, variables = jax.eval_shape(objective.init, rng, batch)
    frozen = abstract_frozen(config)

    trained = trained_params(params, trained_patterns(config))

    def loss(trained: Any, params: Any, variables: Any, frozen: Any, batch: Any, rng: Any) -> Any:
        step = jnp.zeros((), jnp.int32)
        return objective.loss(overlay(params, trained), variables, frozen, batch, rng, step, True)[0]

    inputs = (trained, params, variables, frozen, batch, rng)
    optimizer, _ = create_optimizer(config.optimizer, trained, config.steps, whole=params)
    update = matrix_flops(optimizer.update, trained, jax.eval_shape(optimizer.init, trained), trained)
    parts = _parts(config, config.models, params, depth)
    for part, entry in parts.items():
        entry["held"] = entry["parameters"] - count_parameters(trained.get(part, {}))

    return {
        "objective": config.objective,
        "batch_size": config.batch_size,
        "trained": parts,
        "variables": int(np.sum([math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)])),
        "frozen": _parts(config, config.frozen, {part: trees["params"] for part, trees in frozen.items()}, depth),
        "matrix_flops_per_step": matrix_flops(jax.grad(loss), *inputs) + update,
        "matrix_flops_optimizer": update,
        "matrix_flops_forward": matrix_flops(loss, *inputs),
    }


def describe_run(folder: str, depth: int) -> dict[str, Any]:
    """As `describe`, of a run folder.

    Converted networks that lack what a training step takes (a text encoder, a first stage, a process) are described by
    themselves, without the figures of a step and with the reason in their place.
    """
    from weights.run import Run
    from weights.sources import random_part, resolve_frozen

    run = Run.open(folder)
    resolve_frozen(run.config, near=run.folder)
    run.config.batch_size = run.config.batch_size or 1
    run.config.steps = run.config.steps or 1  # for a schedule
    try:
        return describe(run.config, depth)
    except UserError as error:
        if not run.converted:
            raise
        reason = str(error)
    import jax

    networks = {part: jax.eval_shape(lambda m=model: random_part(m, 0).trees()) for part, model in run.models().items()}
    return {
        "objective": run.config.objective,
        "trained": _parts(run.config, run.models(), {part: trees["params"] for part, trees in networks.items()}, depth),
        "frozen": {},
        "variables": sum(_size(trees["variables"]) for trees in networks.values()),
        "no_step": reason,
    }


def resolved_config(folder: str) -> Any:
    """The config of a run folder, with what its frozen parts are."""
    from weights.run import Run
    from weights.sources import resolve_frozen

    run = Run.open(folder)
    resolve_frozen(run.config, near=run.folder)
    return run.config


def draw_figure(config: Any, title: str) -> str:
    """The map of an experiment's networks, as the text of an SVG file; see `cost.architecture.figure`."""
    from cost.architecture.figure import Panel, draw_map
    from cost.architecture.flow import read_flow
    from cost.architecture.modules import read_network
    from cost.architecture.roles import role_of_part
    from cost.architecture.traced import trace_network
    from weights.run import model_of

    panels = []
    for group in ("models", "frozen"):
        for part, entry in config[group].items():
            traced = trace_network(model_of(entry), config)
            tree = read_network(traced)
            role = role_of_part(config.objective, part, entry.name)
            panels.append(Panel(part, role, group == "frozen", tree, read_flow(traced, tree)))
    return draw_map(config.objective, panels, title)


def format_description(description: dict[str, Any]) -> str:
    """Lays a description out for a terminal."""
    from cost.architecture.figure import rounded
    from weights.lora import LORA

    lines = []
    for kind in ("trained", "frozen"):
        for part, entry in description[kind].items():
            key = "config.lora" if LORA in description["trained"] else "config.trainable"
            held = f", {entry['held']:,} of them held by {key}" if entry.get("held") else ""
            work = f", {rounded(entry['flops'])}FLOPs a call" if entry["flops"] else ""
            lines.append(f"{part} ({kind}): {entry['parameters']:,} parameters{held}{work}")
            lines.append(f"  {entry['network']}: {entry['role']}" if entry["role"] else f"  {entry['network']}")
            lines += [_line(module) for module in entry["tree"]]
    lines.append(f"values updated without a gradient: {description['variables']:,}")
    if "no_step" in description:
        return "\n".join([*lines, f"a training step is not described: {description['no_step']}"])
    batch = description["batch_size"]
    lines.append(
        f"matrix FLOPs of a training step at batch size {batch}: {description['matrix_flops_per_step']:.4g} "
        f"({(description['matrix_flops_per_step'] - description['matrix_flops_optimizer']) / batch:.4g} an example, "
        f"forward alone {description['matrix_flops_forward'] / batch:.4g}; "
        f"{description['matrix_flops_optimizer']:.4g} the optimizer)"
    )
    return "\n".join(lines)


def _line(module: Mapping[str, Any]) -> str:
    from cost.architecture.figure import rounded

    work = rounded(module["flops"]) if module["flops"] else ""
    name = "  " * module["level"] + module["title"]
    return f"  {name:<42} {module['parameters']:>15,} {work:>8}  {module['role']}".rstrip()


def _parts(config: Any, models: Any, trees: dict[str, Any], depth: int) -> dict[str, Any]:
    """Parameters, FLOPs and role of each network, and of its modules."""
    from cost.architecture.modules import fold, read_network, read_tree
    from cost.architecture.roles import role_of_part
    from cost.architecture.traced import trace_network
    from weights.run import model_of

    parts = {}
    for part, tree in trees.items():
        # An objective may have parameters of its own, such as the variance of a reconstruction.
        network = (
            read_network(trace_network(model_of(models[part]), config), tree)
            if part in models
            else read_tree(part, tree)
        )
        parts[part] = {
            "network": network.name,
            "role": role_of_part(config.objective, part, network.name),
            "parameters": network.parameters,
            "flops": network.flops,
            "modules": {module.path: module.parameters for _, module in network.walk(depth)},
            "tree": [
                {
                    "level": level,
                    "title": module.title,
                    **{field: getattr(module, field) for field in ("path", "count", "parameters", "flops", "role")},
                }
                for level, module in fold(network).walk(depth)
            ],
        }
    return parts


def _size(tree: Any) -> int:
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    entry_point.run(main)
