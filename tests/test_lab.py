"""The notebooks in a real JupyterLab in a real browser: what a person sees while they run, and at their end."""

import os
import re
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from browser import browser, needs_chromium

pytestmark = [needs_chromium, pytest.mark.slow]
TINY = {
    "explore": {"n_steps": 2000, "n_replicas": 2, "d": 4, "rank": 2, "batch_size": 4, "seq_len": 8},
    "tune": {"study_name": "'s'", "n_trials": 30, "n_steps": 3, "n_replicas": 2, "space": "'small.yaml'",
             "n_workers": 2},
    "confirm": {"study_name": "'s'", "looks": "'2,4'", "n_seed_runs": 30, "n_top": 1, "n_levels": 2, "n_test": 64,
                "with_published": "False"},
    "analyze": {"study_name": "'s'"},
}  # fmt: skip
SPACE = "d: [4, 8]\nrank: [2]\nbatch_size: [4]\nseq_len: [8, 16]\n"
# PANEL: the notebook. OUTPUTS: of its code cells the type of each output, and the text of streams and errors
PANEL = "[...jupyterapp.shell.widgets('main')].find((w) => w.context?.path?.endsWith('.ipynb'))"
OUTPUTS = f"""{PANEL}.content.widgets.filter((c) => c.model.type === "code").map((c) =>
    c.model.sharedModel.toJSON().outputs.map((o) => ({{ type: o.output_type, name: o.name || "",
        kinds: Object.keys(o.data || {{}}), text: [o.text || o.traceback || ""].flat(2).join("\\n") }})))"""
HAS_ERROR = f"{OUTPUTS}.flat().some((o) => o.type === 'error')"
IS_IDLE = f"{PANEL}.sessionContext.session?.kernel?.status === 'idle'"


class Lab:
    """A JupyterLab on a project, and one page of it in a browser."""

    def __init__(self, project, page, url):
        self.project, self.page, self.url = project, page, url

    def open(self, name, **parameters):
        """Open a copy of a notebook that has other values in its parameters cell."""
        notebook = nbformat.read(self.project / "notebooks" / f"{name}.ipynb", as_version=4)
        (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        for key, value in (TINY[name] | parameters).items():
            cell.source, n = re.subn(rf"^({key}: \w+ = ).*?(  #|$)", rf"\g<1>{value}\2", cell.source, flags=re.M)
            assert n == 1, key
        copy = f"{name}-{time.monotonic_ns()}.ipynb"
        nbformat.write(notebook, self.project / "runs" / copy)
        self.page.open(f"{self.url}/lab/tree/runs/{copy}?reset")
        self.page.wait(f"window.jupyterapp?.shell && {PANEL}?.context?.isReady", 60)
        self.page.wait(IS_IDLE, 60)
        self.page.run(f"jupyterapp.shell.activateById({PANEL}.id)")

    def start(self):
        """Run all cells."""
        self.page.run("""(() => {
            window.isDone = false;
            jupyterapp.commands.execute("notebook:run-all-cells").finally(() => { window.isDone = true; });
        })()""")

    def run(self):
        self.start()
        return self.finish()

    def outputs(self):
        return self.page.run(OUTPUTS)

    def finish(self, seconds=240):
        """Wait until all cells have run; returns their outputs."""
        self.page.wait(f"window.isDone && {IS_IDLE}", seconds)
        return self.outputs()

    def interrupt(self):
        """Interrupt as a person does: once more where nothing came of it.

        Python loses an interrupt that arrives in a weak reference's callback, and between two cells there is nothing to
        interrupt. Where all cells have run by then, they are run again."""
        for _ in range(6):
            self.page.run(f"void {PANEL}.sessionContext.session.kernel.interrupt()")
            ends = time.monotonic() + 10
            while time.monotonic() < ends and not self.page.run(f"window.isDone && {IS_IDLE}"):
                if self.page.run(HAS_ERROR):
                    return
                time.sleep(0.1)
            if self.page.run(HAS_ERROR):
                return
            if self.page.run("window.isDone"):
                self.start()
                time.sleep(2)
        raise AssertionError(f"six interrupts stopped nothing; the outputs are {self.outputs()}")


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    project.shorten_report()
    (project / "runs" / "small.yaml").write_text(SPACE)
    folder = tmp_path_factory.mktemp("lab")
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "CTBPRN_STORAGE": "",
                                      "IPYTHONDIR": str(folder / "ipython"), "HOME": str(folder)}  # fmt: skip
    log = (folder / "log").open("w+")
    command = (sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--ServerApp.token=",
               "--ServerApp.password=", "--expose-app-in-browser", "--LabApp.news_url=",
               f"--ServerApp.root_dir={project}")  # fmt: skip
    server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        ends, found = time.monotonic() + 60, None
        while not found:
            assert server.poll() is None and time.monotonic() < ends, (folder / "log").read_text()[-2000:]
            found = re.search(r"http://(?:localhost|127\.0\.0\.1):(\d+)/lab", (folder / "log").read_text())
            time.sleep(0.1)
        url = f"http://127.0.0.1:{found[1]}"
        urllib.request.urlopen(f"{url}/api").close()
        with browser(folder) as page:
            page.size(1280, 900)
            yield Lab(project, page, url)
    finally:
        server.terminate()
        server.wait()
        log.close()


def is_clean(outputs):
    """Whether nothing is red or pink, and nothing is empty."""
    for cell in outputs:
        for output in cell:
            assert output["type"] != "error", output["text"]
            assert output["name"] != "stderr", output["text"]
            assert output["type"] != "stream" or output["text"].strip()
    return True


def test_tune_shows_one_picture_that_follows_and_ends_with_the_report(lab):
    lab.open("tune")
    lab.start()
    count = f"{OUTPUTS}.flat().filter((o) => o.kinds.includes('image/png')).length"
    lab.page.wait(f"{count} === 1", 60)  # while it runs
    lab.interrupt()
    is_one_sentence(lab, "Stopped")
    outputs = lab.run()
    assert is_clean(outputs)
    pictures = [output for cell in outputs for output in cell if "image/png" in output["kinds"]]
    assert len(pictures) == 2, outputs[-3:]  # the one that follows, and that of the report
    assert "text/markdown" in outputs[-1][-1]["kinds"]
    lines = [line for cell in outputs for o in cell for line in o["text"].splitlines() if line.startswith("trial ")]
    assert lines and "30 of 30" in lines[-1]


@pytest.mark.parametrize("name", ["confirm", "analyze", "explore"])
def test_an_interrupt_is_one_sentence_and_all_of_it_runs_clean(lab, name):
    lab.open(name)
    lab.start()
    begun = " of " if name == "confirm" else ""  # the first training imports modules, which must not be interrupted
    lab.page.wait(f"{OUTPUTS}.flat().some((o) => o.text.includes('{begun}'))", 60)
    time.sleep(1)
    lab.interrupt()
    is_one_sentence(lab, ("Interrupted. ", "Stopped"))
    assert is_clean(lab.run())


def test_a_wrong_parameter_is_one_sentence(lab):
    lab.open("tune", pruner="'medium'")
    lab.start()
    is_one_sentence(lab, "pruner must be one of median")


def is_one_sentence(lab, start):
    """Wait for the error that a notebook ends with, which begins so and is one line."""
    lab.page.wait(HAS_ERROR, 60)
    lab.page.wait(IS_IDLE, 60)
    (error,) = (output for cell in lab.outputs() for output in cell if output["type"] == "error")
    assert error["text"].startswith(start) and "\n" not in error["text"] and len(error["text"]) < 200
