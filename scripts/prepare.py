"""`python -m scripts.prepare --dataset=scenes/single32`: makes a dataset and its tokenizer."""

import time
from collections.abc import Sequence

from cli import entry_point
from cli.errors import UserError
from data import scenes
from data.records import DEFAULT_DATA_DIR, RecordSource, dataset_folder, known_datasets
from data.tokenizer import Tokenizer

_DESCRIPTION = """\
Prepares a dataset on this machine and trains its tokenizer; what is already there is left as it is.
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and prepares."""
    parser = entry_point.parser("scripts.prepare", _DESCRIPTION)
    parser.add_argument("--dataset", default="scenes", help=f"scenes (all of it), or {', '.join(known_datasets())}")
    parser.add_argument("--data_dir", default="", help=f"where datasets are kept (default {DEFAULT_DATA_DIR})")
    parser.add_argument("--vocab_size", type=int, default=512, help="ids of the tokenizer at most (default 512)")
    options = parser.parse_args(arguments)
    names = [name for name in known_datasets() if name == options.dataset or name.startswith(f"{options.dataset}/")]
    if not names:
        raise UserError(f"unknown dataset {options.dataset!r}; choose scenes, {', '.join(known_datasets())}")
    for name in names:
        prepare(name, options.data_dir, options.vocab_size)


def prepare(dataset: str, data_dir: str, vocab_size: int) -> None:
    """Writes one dataset and the tokenizer of its training captions."""
    start = time.monotonic()
    print(f"preparing {dataset} (nothing is downloaded)", flush=True)
    try:
        scenes.prepare(dataset.removeprefix("scenes/"), data_dir or DEFAULT_DATA_DIR)
    except OSError as error:
        raise UserError(
            f"cannot write the dataset to {data_dir or DEFAULT_DATA_DIR}: {error.strerror}; choose another --data_dir"
        ) from error
    folder = dataset_folder(dataset, data_dir)
    path = folder / "tokenizer.json"
    source = RecordSource(dataset, "train", data_dir, pictures=False)
    if not path.is_file():
        captions = {caption for index in range(len(source)) for caption in source[index]["captions"]}
        Tokenizer.train(sorted(captions), vocab_size).save(path)
    tokenizer = Tokenizer.load(path)
    print(
        f"{dataset}: {len(source)} training pictures, {tokenizer.vocab_size} text ids, in {folder} "
        f"({time.monotonic() - start:.0f} s)"
    )


if __name__ == "__main__":
    entry_point.run(main)
