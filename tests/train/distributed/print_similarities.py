"""Run by test_devices.py with eight simulated devices: shapes of similarities in CLIP's compiled step of 72 pairs."""

import re

from cli.config import load_config
from cost.measured import made_up_batch
from train.distributed.mesh import make_mesh
from train.program import create_program


def main() -> None:
    config = load_config(["--config=configs/scenes/clip.py:debug", "--config.batch_size=72", "--config.mesh.data=8"])
    program = create_program(config, make_mesh(config.mesh))
    with program.in_mesh():
        batch = made_up_batch(program, config)
        text = program.train_step.lower(program.init(batch), {}, batch).compile().as_text()
    print(*sorted(set(re.findall(r"f32\[(?:\d+,)*(?:72|9),(?:72|9)\]", text))))


main()
