"""From an executed notebook to reports/: report.md beside its pictures, and report.html, which loads nothing.

publish runs analyze.ipynb on a study; python -m ctbprn_lib.publish EXECUTED_NOTEBOOK STUDY_NAME renders any other. The
notebook writes into a folder beside the published one, and only what is whole is moved there.
"""

import base64
import fcntl
import io
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from ctbprn_lib import InputError
from ctbprn_lib.storage import REPORTS, study_folder

CSS = """body{max-width:66rem;margin:2rem auto;padding:0 1rem;font:16px/1.55 system-ui,sans-serif;color:#1a1a1a}
h1,h2,h3{line-height:1.25}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}img{max-width:100%;height:auto}
table{border-collapse:collapse;display:block;overflow-x:auto;font-size:.82rem}th,td{border:1px solid #ddd;
padding:.3rem .55rem;text-align:left;white-space:nowrap}th{background:#f4f4f4;white-space:normal}
table:has(th:nth-child(3):last-child) td,table:has(th:nth-child(12)) td{white-space:normal}
table:has(th:nth-child(12)){font-size:.76rem}table:has(th:nth-child(12)) :is(td,th){padding:.3rem}
code{background:#f4f4f4;padding:0 .2em}
pre{background:#f4f4f4;padding:.6rem;white-space:pre-wrap}pre code{padding:0}.anchor-link{display:none}"""
PAGE = """{%- extends 'basic/index.html.j2' -%}
{%- block header -%}<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{{ resources.page_title }}</title>
<style>{{ resources.page_css }}</style></head><body><main>{%- endblock header -%}
{%- block footer -%}</main></body></html>{%- endblock footer -%}"""


def check_folders(study_name: str) -> None:
    """Raise InputError where a report could not be written in the end; called before anything is trained."""
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


def staging(study_name):
    """An empty folder for what render will move to reports/<study_name>/."""
    staged = _staged(study_name)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def _staged(study_name):
    folder = study_folder(study_name)
    return folder.with_name(f".{folder.name}.new")


def show(fig, path, alt):
    """Save fig to path (PNG) and show it in the notebook; what is published points at the file, with alt as text."""
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


def publish(study_name, storage=""):
    """Run analyze.ipynb on the study and write reports/<study_name>/report.md and report.html; returns their folder."""
    import papermill

    own = REPORTS.parent / "runs" / ".ipython"  # the user's own start-up files and settings would change the page
    executed = REPORTS.parent / "runs" / f"analyze-{study_name}.ipynb"
    executed.parent.mkdir(exist_ok=True)
    with open(executed.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the workers of a study end together, and each publishes it
        with _environment(IPYTHONDIR=str(own)):
            papermill.execute_notebook(
                REPORTS.parent / "notebooks" / "analyze.ipynb",
                executed,
                {"study_name": study_name, "storage": storage},
                cwd=REPORTS.parent,
                progress_bar=False,
            )
        return render(executed, study_name)


@contextmanager
def _environment(**variables):
    """os.environ with these variables, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def render(notebook, study_name):
    """Executed notebook -> report.md and report.html in reports/<study_name>/, with what is staged; returns the folder.

    They have no code, warnings or progress bars in them.  Raises InputError, and moves nothing, if the notebook has not
    been run to its end.
    """
    import nbconvert
    import nbformat

    nb = nbformat.read(notebook, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if any(not c.execution_count or any(o.output_type == "error" for o in c.outputs) for c in code):
        raise InputError(f"{notebook} has not been run to its end; what is published stays as it is")
    for cell in nb.cells:
        outputs = [o for o in cell.get("outputs", []) if not (o.output_type == "stream" and o.name == "stderr")]
        for output in outputs:
            if "file" in output.get("metadata", {}):
                alt = output.metadata["image/png"]["alt"]
                output.data = nbformat.from_dict({"text/markdown": f"![{alt}]({output.metadata['file']})"})
        if cell.cell_type == "code":
            cell.outputs = [] if "unpublished" in cell.metadata.get("tags", []) else outputs
    title = next(c.source.splitlines()[0].lstrip("# ") for c in nb.cells if c.cell_type == "markdown")
    staged, folder = _staged(study_name), study_folder(study_name)
    pictures = staged if staged.exists() else folder  # it is rendered once more
    resources = {"metadata": {"path": str(pictures), "name": title}, "page_title": title, "page_css": CSS}
    hide = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    markdown, _ = nbconvert.MarkdownExporter(**hide).from_notebook_node(nb, resources=dict(resources))
    page, _ = nbconvert.HTMLExporter(raw_template=PAGE, embed_images=True, **hide).from_notebook_node(
        nb, resources=dict(resources)
    )
    staged.mkdir(parents=True, exist_ok=True)
    made = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    for name, text in (("report.html", page), ("report.md", re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n")):
        (staged / name).write_text(text, encoding="utf-8")
        made.append(Path(name))
    for path in made:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / path, folder / path)
    shutil.rmtree(staged)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m ctbprn_lib.publish EXECUTED_NOTEBOOK STUDY_NAME")
    try:
        render(sys.argv[1], sys.argv[2])
    except (InputError, OSError) as error:
        sys.exit(str(error))
