"""What `--prepare` says of the lock file that there is."""

import re
import sys

from cost.gpu_machine import LOCK, describe_preparation, locked_wheels


def test_wheels_are_those_of_the_platform_and_the_python():
    lock = """\
# comment
jax==1.0 ; python_full_version < '3.12'
    # via flax
jax==2.0 ; python_full_version >= '3.12'
gcsfs[extra]==4.0
appnope==1.0.0 ; sys_platform == 'darwin'
nvidia-cublas==13.1 ; sys_platform == 'linux'
cffi==2.0 ; implementation_name == 'pypy' or platform_python_implementation != 'PyPy'
"""
    others = ["gcsfs==4.0", "nvidia-cublas==13.1", "cffi==2.0"]
    assert locked_wheels(lock, "3.11") == ["jax==1.0", *others]
    assert locked_wheels(lock, "3.13") == ["jax==2.0", *others]


def test_preparation_names_what_jax_needs_of_cuda_at_the_locked_versions():
    text, lock = describe_preparation(), LOCK.read_text()
    names = ["jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13", "torch"]
    names += ["tokamax"] if "\ntokamax==" in lock and sys.version_info >= (3, 12) else []  # the first that it runs on
    for name in names:
        found = re.search(rf"\b{name}==(\S+?)[,\s]", text)
        assert found is not None and f"\n{name}==" in lock, name
    assert "DALL-E==" in text and "scripts.benchmark --suite=gpu" in text and "scripts.prepare" in text
