"""From an executed notebook to reports/: report.md beside its pictures, and report.html, which loads nothing.

publish runs analyze.ipynb on a study; python -m ctbprn_lib.publish EXECUTED_NOTEBOOK STUDY_NAME renders any other.
"""

import base64
import io
import os
import re
import sys
from pathlib import Path

from ctbprn_lib.search import REPORTS, study_folder

CSS = """body{max-width:66rem;margin:2rem auto;padding:0 1rem;font:16px/1.55 system-ui,sans-serif;color:#1a1a1a}
h1,h2,h3{line-height:1.25}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}img{max-width:100%;height:auto}
table{border-collapse:collapse;display:block;overflow-x:auto;font-size:.82rem}th,td{border:1px solid #ddd;
padding:.3rem .55rem;text-align:left;white-space:nowrap}th{background:#f4f4f4;white-space:normal}
table:has(th:nth-child(3):last-child) td{white-space:normal}code{background:#f4f4f4;padding:0 .2em}
pre{background:#f4f4f4;padding:.6rem;white-space:pre-wrap}pre code{padding:0}.anchor-link{display:none}"""
PAGE = """{%- extends 'basic/index.html.j2' -%}
{%- block header -%}<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{{ resources.page_title }}</title>
<style>{{ resources.page_css }}</style></head><body><main>{%- endblock header -%}
{%- block footer -%}</main></body></html>{%- endblock footer -%}"""


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

    folder = study_folder(study_name)
    executed = REPORTS.parent / "runs" / f"analyze-{study_name}.ipynb"
    executed.parent.mkdir(exist_ok=True)
    papermill.execute_notebook(
        REPORTS.parent / "notebooks" / "analyze.ipynb",
        executed,
        {"study_name": study_name, "storage": storage},
        cwd=REPORTS.parent,
        progress_bar=False,
    )
    render(executed, folder)
    return folder


def render(notebook, folder):
    """Executed notebook -> folder/report.md and folder/report.html, without code, warnings or progress bars."""
    import nbconvert
    import nbformat

    nb = nbformat.read(notebook, as_version=4)
    for cell in nb.cells:
        outputs = [o for o in cell.get("outputs", []) if not (o.output_type == "stream" and o.name == "stderr")]
        for output in outputs:
            if "file" in output.get("metadata", {}):
                alt = output.metadata["image/png"]["alt"]
                output.data = nbformat.from_dict({"text/markdown": f"![{alt}]({output.metadata['file']})"})
        if cell.cell_type == "code":
            cell.outputs = [] if "unpublished" in cell.metadata.get("tags", []) else outputs
    title = next(c.source.splitlines()[0].lstrip("# ") for c in nb.cells if c.cell_type == "markdown")
    resources = {"metadata": {"path": str(folder), "name": title}, "page_title": title, "page_css": CSS}
    hide = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    markdown, _ = nbconvert.MarkdownExporter(**hide).from_notebook_node(nb, resources=dict(resources))
    page, _ = nbconvert.HTMLExporter(raw_template=PAGE, embed_images=True, **hide).from_notebook_node(
        nb, resources=dict(resources)
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.md", re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"), ("report.html", page)):
        temporary = folder / f".{name}.new"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m ctbprn_lib.publish EXECUTED_NOTEBOOK STUDY_NAME")
    render(sys.argv[1], study_folder(sys.argv[2]))
