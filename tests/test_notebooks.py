"""The notebooks: what is stored of them, and that they run from top to bottom."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
LARGEST = 300_000  # bytes of one, with its outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_whole_and_small(path):
    """As it was executed, from the first cell to the last, without an error or a path of the machine that did it."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(text.encode()) < LARGEST
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "/root/" not in text and "/home/" not in text and str(ROOT) not in text
    # Colab reads these: a GPU is asked for when it is opened there.
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"]
    assert path.name in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_text_to_image_runs_from_top_to_bottom(scenes_dir, tmp_path, monkeypatch):
    """With toys that are trained for seconds, and a small pipeline of random weights in place of published ones."""
    import nbformat
    from nbclient import NotebookClient

    from .weights.stable_diffusion_samples import write_pipeline

    write_pipeline(tmp_path / "pipeline")
    settings = {"QUICK": "1", "RUNS": tmp_path / "runs", "DATA": scenes_dir, "PUBLISHED": tmp_path / "pipeline"}
    for name, value in {**settings, "PROMPT": "a red cat"}.items():
        monkeypatch.setenv(f"TESSERA_{name}", str(value))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "text_to_image.ipynb", as_version=4)
    for steps, fewer in (("2,5,10,25,50", "2,5"), ("5,10,20,50", "2,3")):  # each number is a program of its own
        (cell,) = (cell for cell in notebook.cells if f"--sweep steps={steps} " in cell.source)
        cell.source = cell.source.replace(f"steps={steps} ", f"steps={fewer} ")
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT / "docs" / "notebooks"}}
    ).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert all((tmp_path / "runs" / name / "DONE").exists() for name in ("autoencoder", "latent_uvit"))
    assert "guidance enters here" in said and "first stage: E makes latents" in said
    assert "weights of 'a (red:1.4) cat'" in said
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 2
    made = tmp_path / "runs" / "text_to_image"
    assert (made / "maps.png").is_file() and (made / "published_maps.png").is_file()
    assert (made / "steps" / "sweep.csv").is_file() and (made / "published_steps" / "grid.png").is_file()
