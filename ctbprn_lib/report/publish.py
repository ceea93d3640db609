"""From an executed notebook to reports/: report.md beside its pictures, and report.html, which loads nothing.

publish runs analyze.ipynb on a study. python -m ctbprn_lib.report.publish EXECUTED_NOTEBOOK STUDY_NAME publishes any
other notebook. A notebook writes into a folder beside the published one, and only what is whole is moved there.
"""

import base64
import fcntl
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ctbprn_lib import InputError
from ctbprn_lib.storage import REPORTS, study_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from nbformat import NotebookNode

HERE = Path(__file__).parent


def check_folders(study_name: str) -> None:
    """Raise InputError if no report could be written at the end.  Call it before anything is trained."""
    folder = study_folder(study_name)
    for place in (REPORTS.parent / "runs", folder if folder.exists() else REPORTS):
        try:
            place.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=place) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise InputError(
                f"{place}: nothing can be written or locked there ({error.strerror}), so there could be no report; "
                "copy the project to a folder of your own and run it there"
            ) from None


def staging(study_name: str) -> Path:
    """An empty folder, whose files publish_notebook will move to reports/<study_name>/."""
    staged = _staged(study_name)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def _staged(study_name: str) -> Path:
    folder = study_folder(study_name)
    return folder.with_name(f".{folder.name}.new")


def show(fig: "Figure", path: Path, alt: str) -> None:
    """Save fig as a PNG file at path and show it in the notebook.

    The published page points at the file, with alt as its alternative text.
    """
    import matplotlib.pyplot as plt
    from IPython.display import publish_display_data

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    fig.savefig(png, format="png")
    plt.close(fig)
    path.write_bytes(png.getvalue())
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": alt}
    publish_display_data(data, {"image/png": {"alt": alt}, "file": f"{path.parent.name}/{path.name}"})


def publish(study_name: str, storage: str = "") -> Path:
    """Run analyze.ipynb on the study and publish it.  Returns the folder of report.md and report.html.

    storage: the URL of the study's database; empty for the usual place.
    """
    import papermill

    own = REPORTS.parent / "runs" / ".ipython"  # the user's own start-up files and settings would change the page
    executed = REPORTS.parent / "runs" / f"analyze-{study_name}.ipynb"
    own.mkdir(parents=True, exist_ok=True)
    with open(executed.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the workers of a study end together, and each publishes it
        papermill.execute_notebook(
            REPORTS.parent / "notebooks" / "analyze.ipynb",
            executed,
            {"study_name": study_name, "storage": storage},
            cwd=REPORTS.parent,
            progress_bar=False,
            extra_arguments=[f"--ipython-dir={own}"],
        )
        return publish_notebook(executed, study_name)


def publish_notebook(notebook: str | Path, study_name: str) -> Path:
    """Convert an executed notebook to report.md and report.html, and move them to reports/<study_name>/.

    What the notebook has staged is moved with them. The pages hold no code, warnings or progress bars. Returns the
    folder. Raises InputError, and moves nothing, if the notebook has not been run to its end.
    """
    import nbconvert
    import nbformat

    nb = nbformat.read(notebook, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if any(not c.execution_count or any(o.output_type == "error" for o in c.outputs) for c in code):
        raise InputError(f"{notebook} has not been run to its end; what is published stays as it is")
    _keep_what_is_published(nb)
    title = next(c.source.splitlines()[0].lstrip("# ") for c in nb.cells if c.cell_type == "markdown")
    staged, folder = _staged(study_name), study_folder(study_name)
    pictures = staged if staged.exists() else folder  # a notebook may be converted once more
    resources = {"metadata": {"path": str(pictures), "name": title}, "page_title": title}
    resources["page_css"] = (HERE / "page.css").read_text(encoding="utf-8")
    page_template = (HERE / "page.html.j2").read_text(encoding="utf-8")
    hide = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    to_markdown = nbconvert.MarkdownExporter(**hide)
    to_html = nbconvert.HTMLExporter(raw_template=page_template, embed_images=True, **hide)
    markdown, _ = to_markdown.from_notebook_node(nb, resources=dict(resources))
    page, _ = to_html.from_notebook_node(nb, resources=dict(resources))
    staged.mkdir(parents=True, exist_ok=True)
    made = [path for path in staged.rglob("*") if path.is_file()]
    for name, text in (("report.html", page), ("report.md", re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n")):
        (staged / name).write_text(text, encoding="utf-8")
        made.append(staged / name)  # the pages come last, when what they point at is there
    for path in made:
        place = folder / path.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(staged)
    return folder


def _keep_what_is_published(nb: "NotebookNode") -> None:
    """Drop stderr and the outputs of cells tagged "unpublished", and let pictures point at their files."""
    import nbformat

    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        if "unpublished" in cell.metadata.get("tags", []):
            cell.outputs = []
        cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        for output in cell.outputs:
            if "file" in output.get("metadata", {}):
                alt = output.metadata["image/png"]["alt"]
                output.data = nbformat.from_dict({"text/markdown": f"![{alt}]({output.metadata['file']})"})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m ctbprn_lib.report.publish EXECUTED_NOTEBOOK STUDY_NAME")
    try:
        publish_notebook(sys.argv[1], sys.argv[2])
    except (InputError, OSError) as error:
        sys.exit(str(error))
