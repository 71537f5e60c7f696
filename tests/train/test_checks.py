"""What is wrong with a config itself, found before anything is read."""

import pytest

from cli.errors import UserError
from configs.common import get_defaults
from train.checks import check_config


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("ema", "paths", "(", r"config.ema.paths: '\(' is not a pattern of paths"),
        ("mesh", "rules", (("(", ()),), r"config.mesh.rules\[0\]: '\(' is not a pattern of paths"),
        ("mesh", "rules", ((".*", ()), 3), r"config.mesh.rules\[1\] is 3; it must be \(pattern, "),
        ("mesh", "rules", ((".*", (1,)),), r"config.mesh.rules\[0\] is \('\.\*', \(1,\)\)"),
    ],
)
def test_patterns_are_checked(group, key, value, message):
    config = get_defaults()
    config.steps = config.batch_size = config.log.every = config.evaluate.every = config.checkpoint.every = 1
    check_config(config)
    config[group][key] = value
    with pytest.raises(UserError, match=message):
        check_config(config)
