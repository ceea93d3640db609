"""Files that are damaged or made to harm: each is read, or refused with one kind of error that names it.

Nothing else may come of one: no other exception, no warning, no hang, no code run, no memory that the file is not
worth. The damaged ones are real files of the kind, broken with a fixed seed.
"""

import html.parser
import io
import json
import os
import pickle
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import bs4
import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbconvert.filters import markdown2html
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_report import made_up

from ctbprn_lib import InputError, checkpoint, files, report, search, tasks
from ctbprn_lib.audit import original, simulate
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.report import facts, figures
from ctbprn_lib.report import tables as report_tables
from ctbprn_lib.report.publish import publish_notebook
from ctbprn_lib.report.text import outside
from ctbprn_lib.storage import study_folder
from ctbprn_lib.train import PeakMemory

ROOT = Path(__file__).parent.parent
FUZZ = settings(max_examples=80, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
MARKS = [b"\x00", b"\xff", b"\n", b",", b":", b'"', b"9" * 400, b"nan", b"1e999"]
LARGEST = 400  # MiB that reading one hostile file may take


class Hang(BaseException):
    """Not an Exception, so that no reader can take it for a parser's."""


def outcome(path, read):
    """Call read and return "read" or the text of its refusal; another error or twenty seconds of waiting fail."""

    def stop(*_):
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        read()
    except InputError as error:
        said = str(error)
        assert Path(path).name[:50] in said and len(said) < 2100
        assert all(c.isprintable() or c == "\n" for c in said)
        return said
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return "read"


@pytest.fixture(autouse=True)
def little_memory():
    """The process's peak grows by no more than LARGEST."""
    memory = PeakMemory(torch.device("cpu"))
    yield
    assert not memory.mib() > LARGEST  # not a number where the system does not say


def damaged(whole, n):
    """n copies of some bytes, each cut, flipped, overwritten, thinned, doubled or stretched somewhere."""
    rng = np.random.default_rng(0)
    for i in range(n):
        a, b = sorted(int(x) for x in rng.integers(0, len(whole), 2))
        one = bytearray(whole)
        if i % 6 == 0:
            yield bytes(one[:b])
            continue
        if i % 6 == 1:
            one[b] ^= 1 << int(rng.integers(8))
        elif i % 6 == 2:
            one[a : a + 8] = rng.bytes(8)
        elif i % 6 == 3:
            del one[a : min(b, a + 40)]
        elif i % 6 == 4:
            one[b:b] = one[a : a + 40]
        else:
            one[a:a] = MARKS[rng.integers(len(MARKS))]
        yield bytes(one)


def refusals(path, contents, read):
    """How many of these contents of the file path are refused."""
    n = 0
    for content in contents:
        path.write_bytes(content)
        n += outcome(path, read) != "read"
    return n


def use(task):
    """What a notebook does with a task first."""
    task.draw(2, 4, torch.Generator().manual_seed(0))
    assert all(batch.x.isfinite().all() for batch in task.fixed("test"))
    task.baselines()


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# ---- .npz


def plain(n=30):
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(n, 4, 3)), "y": np.arange(n) % 2, "areas": np.array(["a", "b", "b"])}


def npy(array, **kw):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **kw)
    return file.getvalue()


def header(shape, descr="'<f4'", data=b"", version=b"\x01\x00"):
    """A .npy of whatever its header says."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def archive(path, members, **kw):
    """A .npz of arrays or of the bytes of a .npy."""
    with zipfile.ZipFile(path, "w", **kw) as file:
        for name, member in members.items():
            file.writestr(f"{name}.npy", member if isinstance(member, bytes) else npy(member))
    return path


def load(path):
    return outcome(path, lambda: use(tasks.load_task(str(path))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
    path = tmp_path / "damaged.npz"
    save(path, **plain())
    assert load(path) == "read"
    assert refusals(path, damaged(path.read_bytes(), 90), lambda: use(tasks.load_task(str(path)))) > 60


def test_damaged_arrays_in_a_whole_npz(tmp_path):
    """With the right checksum, so that numpy's reader meets the damage."""
    path, arrays = tmp_path / "damaged.npz", plain()
    members = [arrays | {name: content} for name in arrays for content in damaged(npy(arrays[name]), 40)]
    refused = sum(load(archive(path, one)) != "read" for one in members)
    assert 50 < refused < len(members) - 5


def unusual():
    """(what is changed, what is said) of arrays that numpy can hold and a task cannot."""
    x, big = plain()["x"], np.zeros((30, 4, 3))
    far, split = 1e-9 * x, np.repeat(["train", "validation", "test"], 10)
    far[-6:] = 3e38
    huge = ("(1000000000000,)", "(4294967296, 4294967296, 1)", "(9" + "9" * 5000 + ",)")
    for shape in (*huge, "(-1, 4, 3)", "(" * 500, "-" * 9000 + "1"):
        yield {"x": header(shape)}, "x.npy: not a plain array"
    yield {"x": header("(30, 4, 3)", data=b"short")}, "x.npy: not a plain array"
    for shape, descr in (("(30L, 4L, 3L)", "'<f8'"), ("(3,)", "'<U1000000000'"), ("()", "[('a', '<f4'), ('b', 'O')]")):
        yield {"x": header(shape, descr, b"a")}, "x.npy: not a plain array"
    for shape in ("(30, 0, 3)", "(30, 4, 0)", "(0, 4, 3)"):
        yield {"x": header(shape)}, "x is empty"
    yield {"x": header("(30,4,3)", "'>f2'", b"\x7e" * 720)}, "missing or infinite"
    yield {"y": header("(1000000000000,)", "'<U0'")}, "y"
    no_bytes = header("(1000000000000,)", "'|V0'")
    for name, said in (("y", "be"), ("areas", "name"), ("split", "be"), ("lengths", "be")):
        yield {name: no_bytes}, f"{name} must {said}"
    for areas in (no_bytes, np.array("a")):
        yield {"x": np.zeros((30, 2, 4, 3)), "areas": areas}, "areas must name the 2 areas"
    for other in (x > 0, x + 1j, x.astype("U8"), x.astype("datetime64[s]")):
        yield {"x": other}, re.escape(f"x must hold numbers, got dtype {other.dtype}")
    yield {"x": x * np.nan}, "missing or infinite values"
    yield {"x": np.where(x > 0, 1.7e308, -1.7e308)}, "more than float64 can hold"
    yield {"x": x.astype(np.longdouble) * np.longdouble("1e4000")}, "missing or infinite values"
    yield {"x": far, "split": split}, "so far from the training samples"
    for flat in (x[0], x[:, 0]):
        yield {"x": flat}, r"x must be \(N,K,T,F\)"
    yield {"y": np.arange(30.0)}, "y must hold whole numbers or strings"
    yield {"y": np.zeros((30, 1), int)}, "y must be"
    yield {"y": np.zeros(30, int)}, "single class"
    yield {"extra": x}, "expected the arrays x, y .* got .*extra"
    yield {"y": np.arange(30)}, "no sample is left"
    for character in (b"\xff\xff\xff\x7f", b"\x00\xd8\0\0"):
        yield {"y": header("(30,)", "'<U1'", character * 15 + b"a\0\0\0" * 15)}, "y must hold .* no text"
    yield {"y": np.array([b"\xff", b"a"] * 15)}, "y must hold .* no text"
    yield {"areas": np.array([np.nan, 1, 1])}, "areas must hold"
    yield {"areas": np.array(["a", "b"])}, "areas must name"
    for length in (-1, np.uint64(2**63), 2.0):
        yield {"lengths": np.full(30, length)}, "lengths must be"
    yield {"split": np.full(30, "exam")}, "split must be"
    yield {"split": np.full(30, "train")}, "no sample is left for test"
    yield {"x": big[:, :, :1].repeat(9000, 2), "areas": np.minimum(np.arange(9000), 4500)}, "areas differ too much"
    yield {"e\x1b[31m\u202e" * 999: x}, "expected the arrays"


@pytest.mark.parametrize(("change", "said"), list(unusual()))
def test_arrays_that_no_task_can_be_made_of(tmp_path, change, said):
    path = archive(tmp_path / "odd.npz", plain() | change)
    assert re.search(rf"odd.npz: .*{said}", load(path))


def test_a_pickle_is_never_read(tmp_path):
    path, network, marker = tmp_path / "code.npz", tmp_path / "code.safetensors", tmp_path / "ran"
    objects = np.array([Code(marker)], dtype=object)
    contents = [npy(objects, allow_pickle=True), pickle.dumps(Code(marker)), header("(1,)", "'O'")]
    assert all(load(archive(path, plain() | {"x": content})) != "read" for content in contents)
    torch.save({"a": Code(marker)}, network)
    contents.append(network.read_bytes())
    assert refusals(path, contents, lambda: tasks.load_task(str(path))) == len(contents)
    assert refusals(network, contents, lambda: CTBPRN.load(network)) == len(contents)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Code(marker)))
    assert marker.exists()


def test_nothing_in_the_project_reads_a_pickle_or_runs_what_it_reads():
    sources = [*(ROOT / "ctbprn_lib").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    reads = r"pickle\.loads?\(|read_pickle|torch\.load\(|joblib|allow_pickle=True|yaml\.load\(|\b(eval|exec)\("
    assert len(sources) > 20
    found = [path.name for path in sources if re.search(reads, path.read_text().replace("safe_load(", ""))]
    assert found == ["watch.py"]  # which somebody runs to convert the file of a package; nothing imports it
    assert not any("watch" in re.findall(r"^(?:from|import) .*", path.read_text(), re.M) for path in sources)


def test_a_small_archive_that_unpacks_to_much_is_refused_and_one_without_compression_is_not(tmp_path):
    path = tmp_path / "bomb.npz"
    bomb = plain() | {"x": np.zeros((30, 4000, 300), np.uint8)}
    with pytest.raises(InputError, match=r"bomb.npz: unpacks to 36,000,\d+ bytes.*numpy.savez, which"):
        tasks.load_task(str(archive(path, bomb, compression=zipfile.ZIP_DEFLATED)))
    assert files.npz(archive(path, bomb), ["x"], ["y", "areas"])["x"].shape == (30, 4000, 300)
    archive(path, plain() | {"x": npy(np.zeros(1000))})
    content = bytearray(path.read_bytes())
    for at in range(len(content) - 46):  # every size that the directory states becomes four GiB
        if content[at : at + 4] == b"PK\x01\x02":
            content[at + 24 : at + 28] = b"\xf0\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bomb.npz: unpacks to"):
        tasks.load_task(str(path))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_zipfile_will_not_open(tmp_path):
    path = archive(tmp_path / "odd.npz", plain())
    whole = path.read_bytes()
    local, central = whole.index(b"PK\x03\x04"), whole.index(b"PK\x01\x02")
    for at, change in ((6, b"\x01\x00"), (8, b"\x63\x00"), (6, b"\x20\x00"), (4, b"\xff\x00")):  # encrypted, ...
        content = bytearray(whole)
        content[local + at : local + at + 2] = content[central + at + 2 : central + at + 4] = change
        path.write_bytes(content)
        assert load(path) != "read"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("x", "x", "y", "areas"):
            file.writestr(f"{name}.npy", npy(plain()[name]))
    assert load(path) != "read"
    path.write_bytes(npy(plain()["x"]))
    assert load(path) != "read"


@FUZZ
@given(data=st.data())
def test_any_small_arrays(tmp_path, data):
    kinds = ["<f4", ">f8", "<i2", "|u1", "<U3", "|S2", "|b1", "<c8", "<M8[s]", "<f2"]
    members = {}
    for name in data.draw(st.sets(st.sampled_from(["areas", "split", "lengths", "z"]))) | {"x", "y"}:
        dtype = np.dtype(data.draw(st.sampled_from(kinds)))
        shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
        n = int(np.prod(shape)) * dtype.itemsize
        members[name] = npy(np.frombuffer(data.draw(st.binary(min_size=n, max_size=n)), dtype).reshape(shape))
    load(archive(tmp_path / "any.npz", plain() | members))


# ---- .ts


@pytest.fixture
def motions(tmp_path):
    """A folder with twelve training and eight test series of BasicMotions, and their text."""
    aeon = pytest.importorskip("aeon")
    folder, texts = tmp_path / "Moves", {}
    folder.mkdir()
    for part, n in (("TRAIN", 3), ("TEST", 2)):
        lines = (Path(aeon.__file__).parent / f"datasets/data/BasicMotions/BasicMotions_{part}.ts").read_text()
        top, body = lines.split("@data\n")
        body = [line for i, line in enumerate(body.splitlines()) if i % 10 < n]
        short = [":".join(",".join(c.split(",")[:12]) for c in line.split(":")) for line in body]
        texts[part] = f"{top}@data\n" + "\n".join(short) + "\n"
        (folder / f"Moves_{part}.ts").write_text(texts[part])
    return folder, texts


def load_ts(folder):
    return outcome("Moves", lambda: use(tasks.load_task(f"uea:{folder}")))


def test_damaged_ts(motions):
    folder, texts = motions
    assert load_ts(folder) == "read"
    refused = 0
    for content in damaged(texts["TRAIN"].encode(), 90):
        (folder / "Moves_TRAIN.ts").write_bytes(content)
        refused += load_ts(folder) != "read"
    assert refused > 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.split("@data")[0], "the last of them @data"),
        (lambda t: t.replace("@timeStamps false", "@timeStamps yes"), "@timestamps must be true or false"),
        (lambda t: t.rstrip()[:-3], "the class 'Badmin', which @classLabel does not name"),
        (lambda t: t.replace(":", ",", 40), "channels, where the first|not a readable .ts|equal length"),
        (
            lambda t: t.split("@data")[0] + "@data\n" + "1," * 9000 + "1" + ":1" * 9000 + ":standing\n",
            "equal length|not a readable",
        ),
        (lambda t: t + "@data\n", "expected channels of equal length and a class label"),
        (lambda t: t.replace("0.", "1e99999"), "missing or infinite"),
        (lambda t: t.replace("0.", "?"), "missing or infinite|not a readable"),
        (lambda t: t.replace("0.", "\x00"), "not a readable"),
    ],
)
def test_ts_files_that_lie(motions, change, said):
    folder, texts = motions
    (folder / "Moves_TRAIN.ts").write_text(change(texts["TRAIN"]))
    assert re.search(rf"Moves.*({said})", load_ts(folder))


def test_ts_parts_that_do_not_fit_each_other(motions):
    folder, texts = motions
    path = folder / "Moves_TEST.ts"
    path.write_text(texts["TEST"].split("@data")[0] + "@data\n1,2,3:Standing\n")
    with pytest.raises(InputError, match=r"Moves_TEST.ts: 1 channels, where the training file has 6"):
        tasks.load_task(f"uea:{folder}")
    path.unlink()
    with pytest.raises(InputError, match=r"Moves_TEST.ts: there is no such file"):
        tasks.load_task(f"uea:{folder}")
    top = "@problemName x\n@timeStamps false\n@univariate true\n@equalLength false\n@classLabel true a b\n@data\n"
    body = "1,2:a\n1,2:b\n" * 2000
    (folder / "Moves_TRAIN.ts").write_text(top + body + ",".join("1" * 20_000) + ":a\n")
    path.write_text(top + body)
    with pytest.raises(InputError, match="Moves: padded to the longest series, 20000 tokens, it is"):
        tasks.load_task(f"uea:{folder}")


def test_names_of_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    for name in ("pipe.npz", "folder.npz", "x" * 5000 + ".npz", "\0.npz", "\x1b[31m\u202e.npz", "a\ud800.npz"):
        path = str(tmp_path / name)
        for read in (
            lambda path=path: tasks.load_task(path),
            lambda path=path: tasks.load_task(f"uea:{path}"),
            lambda path=path: search.load_space(path, tasks.RoutingTask()),
            lambda path=path: CTBPRN.load(path),
            lambda path=path: files.table(path),
        ):
            assert outcome("", read) != "read"


# ---- YAML


def load_yaml(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    def read():
        space = search.load_space(path, tasks.RoutingTask())
        trial = search.optuna.create_study().ask()
        assert search.suggest(trial, space)

    return outcome(path, read)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, "not a readable YAML") for text in (
            "d: !!python/object/apply:os.mkdir [ran]", "!!python/object/new:os.mkdir [ran]",
            "d: !!python/name:os.system", "d: " + "[" * 4000, "d: " + "[" * 900 + "]" * 900,
            "d: " + "{a: " * 900 + "}" * 900, "d: 2001-13-45", "d: !!int ''", "d: !!timestamp x", "d: !!bool x",
            "d: !!binary x", "d: " + "9" * 5000, "\ud800: 1", "d: 1\n---\nd: 2")),
        *((text, "alias") for text in (
            "a: &a [1]\nd: *a",
            "a: &a [x,x]\n" + "".join(f"{c}: &{c} [*{p},*{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
            "a: &a {d: 1}\n<<: [" + "*a," * 900 + "*a]")),
        *((text, f"{text.split(':')[0]}: out of reach") for text in (
            "d: 0x" + "f" * 5000, "d: -0x" + "f" * 5000, "d: 1" + "0" * 400, "lr: .nan", "lr: [0.001, .inf]",
            "lr: 1.0e-300", "temperature: {low: 0.5, high: 1.0e+300}")),
        *((text, "d must be a whole number") for text in (
            "d: {low: 1.5, high: 3}", "d: [true, 2]", "d: ['1', [2], {3: 4}, null]")),
        ("d: 1 # " + "x" * 10_000, "longer than 10,000 characters"),
        ("seq_len: 129", "the task has 128 tokens"),
        ("? 0x" + "f" * 5000 + "\n: 1", "expected hyperparameters"),
        ("? [1, 2]\n: 3", "expected hyperparameters|not a readable"),
        ("? '\u202e" + "x" * 5000 + "'\n: 1", "not a hyperparameter"),
        ("", "expected hyperparameters"),
    ],
)  # fmt: skip
def test_yaml_that_would_run_expand_or_overflow(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    assert re.search(rf"space.yaml: .*({said})", load_yaml(tmp_path / "space.yaml", text))
    assert time.perf_counter() - started < 10 and not (tmp_path / "ran").exists()


def test_damaged_yaml(tmp_path):
    whole = yaml.safe_dump(search.default_space(tasks.RoutingTask()) | {"n_layers": [1, 2]}).encode()
    seen = [load_yaml(tmp_path / "space.yaml", content) for content in damaged(whole, 120)]
    assert 5 < seen.count("read") < 90


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
for _ in range(2):  # lists and mappings in lists and mappings
    VALUES |= st.lists(VALUES, max_size=4) | st.dictionaries(
        st.sampled_from(["low", "high", "log", "x"]), VALUES, max_size=3
    )


@FUZZ
@given(st.dictionaries(st.sampled_from(search.HYPERPARAMETERS) | st.text(max_size=5), VALUES, max_size=4))
def test_any_yaml(tmp_path, content):
    load_yaml(tmp_path / "any.yaml", yaml.safe_dump(content))


# ---- CSV


@pytest.fixture
def tables(reports):
    """The committed tables that the library reads, where it looks for them."""
    for name in (*READERS, "reproduce/trial_1_seeds.csv"):
        (reports / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "reports" / name, reports / name)
    return reports


RECORD = pd.DataFrame({"route_accuracy": [0.5]})
READERS = {
    "ctbprn/claims.csv": lambda path: list(report_tables.recorded_claims("ctbprn", {})),
    "ctbprn/confirmed.csv": lambda path: simulate.spreads(path),
    "reproduce/trial_2_seeds.csv": lambda _: facts.other_decisions(RECORD, {}),
}


OTHER_CSV = [
    b"", b"\n", b"\x00", b"\xff\xfe", b'"', b"claim\n", b"a,a\n1,2\n", b"a,b\n1\n", b"x" * 200_000,
    b"role,base,factor,level,test_accuracy\nr,,,,1e400\n", b"test_accuracy,test_ce\n2,1\n0.5,1\n",
    b"test_accuracy,test_ce\n0.5,-1\n0.5,1\n", b"test_accuracy,test_ce\n0.5,=cmd|' /C calc'!A0\n",
    b"test_accuracy,test_ce\n0.5,1,1\n0.5,1,1\n", b"test_accuracy,test_ce\n0.5,1\n",
    b"role,base,factor,level,test_accuracy\nr,,,,0.5\n",
]  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_csv_that_is_damaged_or_something_else(tables, name):
    path = tables / name
    whole = path.read_bytes()
    assert outcome(path, lambda: READERS[name](path)) == "read"
    part = whole if "claims" in name else whole[: whole.index(b"\n", 6000)]
    assert refusals(path, damaged(part, 90), lambda: READERS[name](path)) > 15
    assert refusals(path, OTHER_CSV, lambda: READERS[name](path)) == len(OTHER_CSV)


def test_a_table_is_made_once_for_its_settings_and_again_where_it_is_damaged(tmp_path):
    path, made = tmp_path / "kept.csv", pd.DataFrame({"seed": [0, 1], "score": [0.1 + 0.2, 1e-9]})
    calls = []

    def make():
        calls.append(1)
        return made

    for trial, n_calls in ((1, 1), (2, 2), (2, 2)):
        pd.testing.assert_frame_equal(original.read_or_make(path, make, trial=trial), made, check_exact=True)
        assert len(calls) == n_calls
    for content in damaged(path.read_bytes(), 60):
        path.write_bytes(content)
        pd.testing.assert_frame_equal(original.read_or_make(path, make, trial=2), made)
    assert len(calls) > 50 and [p.name for p in tmp_path.iterdir()] == ["kept.csv"]


# ---- networks


def test_damaged_models(tmp_path):
    path = tmp_path / "m.safetensors"
    CTBPRN(4, 8, 2, 2).save(path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    contents = [*damaged(whole, 60), *(header + whole[end:] for header in damaged(whole[:end], 60))]
    assert refusals(path, contents, lambda: CTBPRN.load(path)) > 110


def signed(path, change=None, **config):
    """A model file with the right SHA-256, whatever it holds."""
    model = CTBPRN(4, 8, 2, 2)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()} | (change or {})
    files.write_tensors(path, state, config["text"] if "text" in config else json.dumps(model.config | config))
    return path


LIES = [{"n_replicas": 10**9}, {"stem": "yes"}, {"stem": False}, {"seed": 1}, {"temperature": "x"}]
LIES += [{"d": d} for d in (10**6, -8, 8.0, "8", True, 10**400)] + [{"n_layers": n} for n in (10**9, 0)]
LIES += [{"text": text} for text in ("[" * 100_000, "not JSON", '["d"]', "9" * 5000, "null")]
WRONG_TYPES = (torch.float64, torch.bfloat16, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        *(({}, lie, "does not fit") for lie in LIES),
        *(({"temperature": torch.full((1,), value)}, {}, "temperature above 0") for value in (0.0, -1.0)),
        ({"head_c": torch.full((1, 2), torch.nan)}, {}, "finite"),
        *(({"head_c": torch.zeros(1, 2, dtype=dtype)}, {}, "float32") for dtype in WRONG_TYPES),
        ({"head_c": torch.zeros(1, 3)}, {}, "does not fit"),
        ({"another": torch.zeros(1)}, {}, "does not fit"),
        ({"layers.0.U": torch.zeros(1, 1, 100_000, 1)}, {"d": 100_000, "n_areas": 1, "rank": 1}, "does not fit"),
    ],
)
def test_a_model_whose_configuration_lies_is_refused_before_it_is_built(tmp_path, change, config, said):
    assert CTBPRN.load(signed(tmp_path / "m.safetensors")).config["d"] == 8  # unchanged it is read
    path = signed(tmp_path / "m.safetensors", change, **config)
    with pytest.raises(InputError, match=rf"m.safetensors: .*{said}"):
        CTBPRN.load(path)


def test_damaged_checkpoints_are_passed_over_for_the_one_before(tmp_path):
    path, of, used = tmp_path / "c.safetensors", {"task": "routing"}, []
    for step in (1, 2):
        checkpoint.write(path, {"a": torch.arange(100.0), "b": torch.ones(3)}, of, {"step": step})
    whole = path.read_bytes()
    contents = [*damaged(whole, 120), b"", pickle.dumps(Code(tmp_path / "ran"))]
    for text in ("[" * 100_000, "null", "[1]", "9" * 5000, '{"of": {}}', "not JSON"):  # with the right checksum
        files.write_tensors(tmp_path / "other", {"a": torch.ones(1)}, text)
        contents.append((tmp_path / "other").read_bytes())
    contents.append(safetensors.torch.save({"a": torch.ones(1, dtype=torch.bfloat16)}, metadata={"sha256": ""}))
    for content in contents:
        path.write_bytes(content)
        outcome("", lambda: used.append(checkpoint.read(path, of, lambda _, about: used.append(about))))
    assert used == [{"step": 1}, True] * len(contents) and not (tmp_path / "ran").exists()


# ---- names


NASTY = ["<img src=x onerror=alert(1)>", "**b** `c` [l](http://e) | # $x_1$ \\ ~~s~~ &amp;", "a\n```\n# heading\n",
         "\x1b[31mred\x07", "\u202egnp.exe", "../../up", "long" * 60, "=1+1", "ж字é"]  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_names_from_outside_are_shown_as_text(name):
    shown = outside(name)
    assert shown.isprintable() and not re.search(r"(?<!\\)[<>|`*\[\]~&](?!#36;)", shown.replace("\\\\", ""))
    table = f"| a | b |\n| --- | --- |\n| {shown} | {shown} |\n\nIn a sentence: {shown}"
    page = bs4.BeautifulSoup(markdown2html(table), "html.parser")
    assert [cell.get_text() for cell in page.find_all("td")] == [files.printable(name).strip()] * 2
    assert page.p.get_text() == f"In a sentence: {files.printable(name)}".rstrip()
    assert {tag.name for tag in page.find_all()} <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
    command = f"```\npapermill -p task {files.word(name)}\n```"
    assert command.count("```") - name.count("```") == 2 and len(command.splitlines()) == 3


@pytest.mark.parametrize("name", NASTY)
def test_every_section_shows_every_name_from_outside_as_text(name):
    for facts_of_study in made_up(name):
        for section in report.sections():
            text = report.render(facts_of_study, section)
            lines = [line for line in text.splitlines() if not line.startswith("papermill ")]  # quoted for a shell
            assert outside(name) == name or name not in "\n".join(lines), section
            assert all(line.isprintable() for line in lines), section


@pytest.mark.filterwarnings("ignore:Glyph")  # the font may lack a script
def test_pictures_show_names_without_reading_them_as_mathematics():
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    figures.routing(ax, np.eye(len(NASTY)), NASTY, [f"$\\frac{{{n}$" for n in NASTY], "t", "y")
    fig.savefig(io.BytesIO(), format="png")
    labels = [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    assert len(labels) == 2 * len(NASTY) and all(len(label) <= 31 and label.isprintable() for label in labels)
    plt.close(fig)


def test_study_names_that_a_task_suggests_stay_inside_reports(reports):
    for name in (*NASTY, "..", "/", ".", "-", "\0", "con" * 99):
        folder = study_folder(search.study_name_for(SimpleNamespace(description={"task": f"{name}.npz"})))
        assert folder.parent == reports and folder.resolve().parent == reports.resolve()


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, *sorted(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_hostile_name_changes_nothing_but_the_text_of_a_report(reports):
    shown = []
    for name in ("plain", " ".join(NASTY)):
        unconfirmed = made_up(name)[0]
        pieces = [report.render(unconfirmed, section) for section in ("summary", "measured", "reproduce")]
        output = {"text/markdown": "\n\n".join(pieces)}
        cells = [new_markdown_cell("# Title"), new_code_cell(outputs=[new_output("display_data", output)])]
        nbformat.write(new_notebook(cells=cells), reports / "n.ipynb")
        folder = publish_notebook(reports / "n.ipynb", "shown")
        page = Page((folder / "report.html").read_text())
        lines = (folder / "report.md").read_text().split("\n")
        assert files.printable(name) in page.text and all(line.isprintable() for line in lines)
        shown.append((page.elements, len(lines)))
    assert shown[0] == shown[1]
