"""From an executed notebook to reports/: report.md beside its pictures, and report.html, which loads nothing.

publish runs analyze.ipynb on a study. python -m ctbprn_lib.report.publish EXECUTED_NOTEBOOK STUDY_NAME publishes any
other notebook. A notebook writes into a folder beside the published one, and only what is whole is moved there.
"""

import base64
import fcntl
import html
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ctbprn_lib import InputError
from ctbprn_lib.storage import REPORTS, study_folder

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag
    from IPython.display import Image
    from matplotlib.figure import Figure
    from nbformat import NotebookNode

HERE = Path(__file__).parent
COLOURS = 64  # of a PNG file
MOST_SVG = 60_000  # characters of a picture that the HTML page holds as SVG


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
    """Save fig as a PNG file at path, in a palette of COLOURS, and show it in the notebook.

    The published page in Markdown points at the file, with alt as its alternative text. The HTML page holds it as SVG,
    so that its points have names (see figures.name_points), unless that is longer than MOST_SVG.
    """
    import matplotlib.pyplot as plt
    from IPython.display import publish_display_data
    from PIL import Image as Pixels

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, png = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png")
    fig.set_layout_engine("none")  # what it has arranged stays, and is not worked out again for the SVG
    Pixels.open(drawn).convert("RGB").quantize(COLOURS).save(png, "png", optimize=True)
    svg = svg_of(fig, path.name)
    plt.close(fig)
    path.write_bytes(png.getvalue())
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": alt}
    metadata = {"image/png": {"alt": alt}, "file": f"{path.parent.name}/{path.name}"}
    publish_display_data(data, metadata | ({"svg": svg} if len(svg) <= MOST_SVG else {}))


def image(fig: "Figure") -> "Image":
    """A picture that a notebook can show and update in place, whatever backend matplotlib has there."""
    from IPython.display import Image

    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=100)
    return Image(png.getvalue(), format="png")


def svg_of(fig: "Figure", name: str) -> str:
    """A picture as an SVG element. Points that figures.name_points has named show their names as titles.

    name: of the picture, different from that of all others on the page.
    """
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # which the ids in it begin with
        fig.savefig(file, format="svg", metadata={"Date": None})
    space = "http://www.w3.org/2000/svg"
    ElementTree.register_namespace("", space)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    svg = ElementTree.fromstring(file.getvalue())
    for metadata in svg.findall(f"{{{space}}}metadata"):
        svg.remove(metadata)
    for group in svg.iter(f"{{{space}}}g"):
        names = group.attrib.pop("id", "")
        if names.startswith("["):
            for point, text in zip(group.iter(f"{{{space}}}use"), json.loads(names), strict=False):
                ElementTree.SubElement(point, f"{{{space}}}title").text = text
    return ElementTree.tostring(svg, encoding="unicode")


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
            extra_arguments=[f"--ipython-dir={own}", "--log-level=ERROR"],
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
    pictures = _keep_what_is_published(nb)
    title = next(c.source.splitlines()[0].lstrip("# ") for c in nb.cells if c.cell_type == "markdown")
    staged, folder = _staged(study_name), study_folder(study_name)
    hide = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    markdown, _ = nbconvert.MarkdownExporter(**hide).from_notebook_node(nb)
    body, _ = nbconvert.HTMLExporter(template_name="basic", **hide).from_notebook_node(nb)
    # a notebook may be converted once more
    page = page_of(title, body, pictures, staged if staged.exists() else folder)
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


def _keep_what_is_published(nb: "NotebookNode") -> dict[str, str]:
    """Drop passing outputs and those of cells tagged "unpublished", and let pictures point at their files.

    Returns {file: SVG element} of the pictures that have one.
    """
    import nbformat

    pictures = {}
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        if "unpublished" in cell.metadata.get("tags", []):
            cell.outputs = []
        cell.outputs = [output for output in cell.outputs if not _is_passing(output)]
        for output in cell.outputs:
            if "file" in output.get("metadata", {}):
                file, alt = output.metadata["file"], output.metadata["image/png"]["alt"]
                if "svg" in output.metadata:
                    pictures[file] = output.metadata["svg"]
                output.data = nbformat.from_dict({"text/markdown": f"![{alt}]({file})"})
    return pictures


def _is_passing(output: "NotebookNode") -> bool:
    """Whether an output was for the one who watched: a warning, or a line that said how far a training was."""
    is_progress = output.output_type == "display_data" and set(output.data) == {"text/plain"}
    return is_progress or (output.output_type == "stream" and output.name == "stderr")


def page_of(title: str, body: str, pictures: Mapping[str, str], folder: Path) -> str:
    """One HTML page that loads nothing: body with a table of contents, and with its pictures inside.

    pictures: {file: SVG element}. folder: where the files of all other pictures lie.
    """
    import jinja2
    from bs4 import BeautifulSoup

    soup, inside = BeautifulSoup(body, "html.parser"), {}
    for anchor in soup.select(".anchor-link"):
        anchor.decompose()
    for number, image in enumerate(soup.find_all("img")):
        file, alt = str(image["src"]), str(image["alt"])
        mark = f"@picture {number}@"
        if file in pictures:
            inside[mark] = pictures[file].replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
        else:
            png = base64.b64encode((folder / file).read_bytes()).decode()
            inside[mark] = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{png}">'
        figure, caption = soup.new_tag("figure"), soup.new_tag("figcaption")
        caption.string = alt
        figure.extend([mark, caption])
        around = image.parent
        alone = around is not None and around.name == "p" and len(around.contents) == 1
        (around if around is not None and alone else image).replace_with(figure)
    for table in soup.find_all("table"):
        _complete_table(soup, table)
    contents = [(heading["id"], heading.get_text()) for heading in soup.find_all("h2")]
    parts = {name: (HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    template = jinja2.Template((HERE / "page.html.j2").read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    page = template.render(title=html.escape(title), contents=contents, body=str(soup), **parts)
    for mark, picture in inside.items():
        page = page.replace(mark, picture)
    return page + "\n"


def _complete_table(soup: "BeautifulSoup", table: "Tag") -> None:
    """Say of a table what it is about and what its first row and column are, and let it scroll by itself."""
    heading = table.find_previous(["summary", "h1", "h2", "h3"])
    caption = soup.new_tag("caption")
    caption.string = heading.get_text() if heading else ""
    table.insert(0, caption)
    for cell in table.select("thead th"):
        cell["scope"] = "col"
    for row in table.select("tbody tr"):
        first = row.find("td")
        if first:
            first.name, first["scope"] = "th", "row"
    columns = len(table.select("thead th"))
    table.wrap(soup.new_tag("div", attrs={"class": f"table columns-{columns}", "tabindex": "0"}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m ctbprn_lib.report.publish EXECUTED_NOTEBOOK STUDY_NAME")
    try:
        publish_notebook(sys.argv[1], sys.argv[2])
    except (InputError, OSError) as error:
        sys.exit(str(error))
