"""`python -m scripts.demo`: captions in, graded pictures out, in minutes on a laptop's CPU."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cli import entry_point
from cli.errors import EXIT_FAILURE, EXIT_OK, UserError
from cli.locations import local
from cli.ranges import check_seed
from evaluation.report import Section, headline_records, write_report
from weights.run import DONE

_LARGEST_NUM = 2000

_DESCRIPTION = """\
Prepares the embedded dataset, trains a discrete image tokenizer and an autoregressive transformer on it, draws
captions (among them combinations of shape and color that training never showed), grades the pictures, and writes one
HTML report that grows while you watch. Stopped and started again, it continues.
"""

_CLOSING = """<h2>What to try next</h2><pre>
python -m sample --run={dalle} --prompt="a small red circle on a gray background" --num=8 --out=grid.png
python -m sample --run={dalle} --prompt="a large white star" --guidance=4 --seed=1
python -m evaluation --run={dalle} --num=1000 --guidance=1          # what guidance buys
python -m train --config=configs/scenes/dalle.py --workdir=runs/longer --config.steps=20000 \\
    --config.frozen.dvae.source={dvae}                              # a longer run
python -m train --config=configs/scenes/dvae.py:pair32 --workdir=runs/dvae_pair32     # two objects with relations
</pre>"""


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and runs every stage."""
    parser = entry_point.parser("scripts.demo", _DESCRIPTION)
    parser.add_argument("--workdir", default="runs/demo", help="where runs and the report go (default runs/demo)")
    parser.add_argument("--data_dir", default="", help="where datasets are kept (default: the user's)")
    parser.add_argument("--num", type=int, default=500, help="captions graded of each split (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of both trainings (default 0)")
    parser.add_argument("--debug", action="store_true", help="tiny sizes: the whole path in under a minute or two")
    options = parser.parse_args(arguments)
    if not 1 <= options.num <= _LARGEST_NUM:
        raise UserError(f"--num must be between 1 and {_LARGEST_NUM}, the size of a split, not {options.num}")
    seed = check_seed("--seed", options.seed)
    return _Demo(local(options.workdir, "--workdir"), options.data_dir, options.num, seed, options.debug).run()


class _Demo:
    """The stages, and the report that is written meanwhile."""

    def __init__(self, workdir: Path, data_dir: str, num: int, seed: int, debug: bool):
        self.dvae, self.dalle, self.report = workdir / "dvae", workdir / "dalle", workdir / "report.html"
        self._data_dir, self._num, self._variant = data_dir, num, ":debug" if debug else ""
        self._seed = f"--config.seed={seed}"
        self._start = time.monotonic()

    def run(self) -> int:
        """Runs every stage; returns the exit code of the first that does not succeed."""
        try:
            self._write("Starting.")
        except OSError as error:
            raise UserError(f"cannot write {self.report}: {error.strerror}; choose another --workdir") from error
        print(f"report: {self.report.resolve()} (open it in a browser; it refreshes itself)", flush=True)
        data = [f"--config.data.data_dir={self._data_dir}"] if self._data_dir else []
        where = [f"--data_dir={self._data_dir}"] if self._data_dir else []
        num = f"--num={self._num}"
        dvae, dalle = str(self.dvae), str(self.dalle)
        stages = (
            ("making the dataset", ["scripts.prepare", "--dataset=scenes/single32", *where]),
            (
                "stage 1: training the image tokenizer",
                ["train", f"--config=configs/scenes/dvae.py{self._variant}", f"--workdir={dvae}", self._seed, *data],
            ),
            ("stage 1: grading reconstructions", ["evaluation", f"--run={dvae}", num]),
            (
                "stage 2: training the transformer",
                [
                    "train",
                    f"--config=configs/scenes/dalle.py{self._variant}",
                    f"--workdir={dalle}",
                    f"--config.frozen.dvae.source={dvae}",
                    self._seed,
                    *data,
                ],
            ),
            ("stage 2: drawing captions and grading the pictures", ["evaluation", f"--run={dalle}", num]),
        )
        for status, arguments in stages:
            if arguments[0] == "evaluation" and self._is_graded(Path(arguments[1].removeprefix("--run="))):
                print(f"\n== {status}: done before", flush=True)
                continue
            code = self._stage(status, arguments)
            if code != EXIT_OK:
                self._write(f"Stopped while {status}. The same command continues.", finished=True)
                print(f"stopped while {status}; the same command continues", file=sys.stderr)
                return code
        minutes = (time.monotonic() - self._start) / 60
        self._write(f"Finished; this run of the command took {minutes:.1f} minutes.", finished=True)
        print(f"finished in {minutes:.1f} minutes; report: {self.report.resolve()}")
        return EXIT_OK

    def _stage(self, status: str, arguments: Sequence[str]) -> int:
        """Runs one command as a user would type it, writing the report every few seconds."""
        print(f"\n== {status}\n$ python -m {' '.join(arguments)}", flush=True)
        # In a session of its own, so that Ctrl-C reaches the child once, through `forward`, and not from the terminal
        # as well: a second one would interrupt it before it has saved.
        child = subprocess.Popen([sys.executable, "-m", *arguments], start_new_session=True)

        def forward(number: int, frame: object) -> None:
            child.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while True:
                self._write(f"Now: {status}. {(time.monotonic() - self._start) / 60:.1f} minutes so far.")
                try:
                    code = child.wait(timeout=20)
                    return code if code >= 0 else EXIT_FAILURE  # negative: killed by a signal
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                child.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _is_graded(self, run: Path) -> bool:
        """Whether the run's last checkpoint has been graded on as many captions as wanted."""
        if not (run / DONE).is_file():
            return False
        last = int((run / DONE).read_text(encoding="utf-8"))
        graded = {
            record["split"]
            for record in headline_records(run)
            if record["metric"] == "caption_accuracy" and record["step"] == last and record["num"] >= self._num
        }
        return graded == {"validation", "held_out"}

    def _write(self, status: str, finished: bool = False) -> None:
        sections = (
            Section(
                "Stage 1: pictures as 64 tokens",
                "An autoencoder learns to say a 32 x 32 picture in an 8 x 8 grid of discrete codes. Upper row: "
                "validation pictures; lower row: what is left of them after encoding and decoding.",
                self.dvae,
                {"reconstruction loss": "reconstruction", "codebook perplexity": "perplexity"},
                {"Reconstructions": "*_reconstruction.png"},
            ),
            Section(
                "Stage 2: captions to pictures",
                "A transformer learns to continue a caption with the tokens of its picture. A picture counts as right "
                "only if background, shape, color and size are all as the caption says; held_out are combinations of "
                "shape and color that training never showed.",
                self.dalle,
                {"loss per image token (nats)": "image_loss", "loss per text token (nats)": "text_loss"},
                {
                    "Drawn for validation captions (green frame: all right)": "evaluation_validation.png",
                    "Combinations never trained on": "evaluation_held_out.png",
                    "While training": "[0-9]*.png",
                },
            ),
        )
        closing = _CLOSING.format(dvae=self.dvae, dalle=self.dalle)
        write_report(self.report, "Tessera: captions to pictures", status, sections, closing, 0 if finished else 20)


if __name__ == "__main__":
    entry_point.run(main)
