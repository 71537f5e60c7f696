"""Settings of samplers as a run's config.json may hold them: any value of any key is taken or refused in a line."""

import copy
import functools
import json

import pytest

from cli.config import flatten, from_json, load_config, to_json
from cli.errors import UserError
from sample.samplers import create_sampler


@pytest.mark.parametrize("name", ["toy/swiss_roll", "scenes/dalle", "scenes/unidiffuser"])
def test_a_value_of_another_type_is_a_line_that_names_the_key(name):
    document = json.loads(to_json(load_config([f"--config=configs/{name}.py:debug"])))
    for path in flatten({group: document.get(group, {}) for group in ("sample", "process")}):
        *groups, key = path.split(".")
        for value in (None, "x", [1], {"a": 1}, 1e400):
            changed = copy.deepcopy(document)
            functools.reduce(dict.__getitem__, groups, changed)[key] = value
            try:
                create_sampler(from_json(json.dumps(changed)))
            except UserError as error:
                assert "\n" not in str(error)
                assert groups[0] != "sample" or type(value) is str or f"config.sample.{key} is " in str(error)
            else:
                assert groups[0] == "process"  # some of its fields may be anything
    for value in (None, [], "x") if "process" in document else ():
        with pytest.raises(UserError, match="does not tell on which process"):
            create_sampler(from_json(json.dumps({**document, "process": value})))
