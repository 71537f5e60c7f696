"""Makes torchvision importable beside a torch without CUDA.

Its Linux wheels are built for CUDA: beside a CPU build of torch their operators do not load, and the import then fails
where it describes two of them. No test calls these; they only need a name.
"""

import importlib

from torch import library

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    library.define("torchvision::nms", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    library.define("torchvision::qnms", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
