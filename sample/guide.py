"""Whether the network of one run may guide that of another, which it is told and shown the same as.

Autoguidance (Karras et al. 2024) leads away from what a worse version of the network draws: of the same data, and told
the same. Latents of another first stage are other data though their shapes agree, and captions in another vocabulary
say something else.
"""

from typing import Any

from cli.errors import UserError
from sample.first_stage import PART as FIRST_STAGE
from weights.fingerprint import differing, same_leaves
from weights.run import TOKENIZER, model_of
from weights.sources import Part


def check_guide(ours: Any, theirs: Any) -> None:
    """Looks at two runs whose samplers fit (see `DiffusionSampler.guided_by`).

    Args:
      ours: the one that draws, a `sample.trained.TrainedSampler`.
      theirs: the one that is to guide it, likewise.

    Raises:
      UserError: names what differs of first stage, captions' tokens or the frozen network that reads them; or says that
        both have the same weights, so that there is nothing to lead away from.
    """
    run, guide = ours.run.folder, theirs.run.folder
    if ours.sampler.model == theirs.sampler.model and same_leaves(ours.weights.params, theirs.weights.params):
        raise UserError(
            f"the --guide_run {guide} has the very weights of {run}, so it has no effect; take an earlier "
            "--guide_step, or another run"
        )
    stages = [FIRST_STAGE in one.config.frozen for one in (ours, theirs)]
    if stages[0] != stages[1]:
        kinds = ["latents" if latent else "pixels" for latent in stages]
        raise UserError(f"the --guide_run {guide} learned {kinds[1]}, and {run} learned {kinds[0]}")
    if stages[0] and (found := differing(_part(theirs, FIRST_STAGE), _part(ours, FIRST_STAGE), latents=True)):
        raise UserError(
            f"the --guide_run {guide} learned latents of another first stage than {run}: {'; '.join(found)}; take a "
            "run of the same"
        )
    if ours.sampler.text is not None:
        _check_captions(ours, theirs)


def _check_captions(ours: Any, theirs: Any) -> None:
    """Raises UserError where the same ids mean something else to the other."""
    run, guide = ours.run.folder, theirs.run.folder
    files = [one.run.folder / TOKENIZER for one in (ours, theirs)]
    kept = [file.read_bytes() if file.is_file() else None for file in files]
    if kept[1] is None and kept[0] is not None:
        raise UserError(
            f"the --guide_run {guide} has no {TOKENIZER} that would say which ids it reads; convert it again, with "
            "--tokenizer"
        )
    if None not in kept and kept[0] != kept[1]:
        raise UserError(f"the --guide_run {guide} reads captions with another tokenizer than {run}")
    one, other = ours.sampler.text, theirs.sampler.text
    if one.blank != other.blank:
        raise UserError(f"the --guide_run {guide} reads captions that are ended or filled up otherwise than by {run}")
    # Networks that were trained with their denoisers differ, as these do.
    if one.frozen and other.frozen and (found := differing(_part(theirs, other.part), _part(ours, one.part))):
        raise UserError(
            f"the --guide_run {guide} is told captions by another frozen network than {run}: {'; '.join(found)}; take "
            "a run with the same"
        )


def _part(trained: Any, name: str) -> Part:
    return Part(model_of(trained.config.frozen[name]), **trained.frozen[name])
