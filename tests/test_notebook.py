"""What a notebook shows of our values: whole HTML that escapes every name, is bounded and never raises."""

import html.parser
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ckptmgr
from ckptmgr import CheckpointInfo, CheckpointManager, Damage, LeafDiff, LeafSpec, StructureDiff, VerifyReport

HOSTILE = "<script>alert('1')</script>&amp;"
SPEC = LeafSpec("['layers'][0]['kernel']", ("layers", 0, "kernel"), "jax", (512, 512), "float32")


class Parsed(html.parser.HTMLParser):
    """A page: the rows of its tables, and all its text. Fails for what does not belong there."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag in ("div", "strong", "table", "thead", "tbody", "tr", "th", "td", "p")
        assert set(attributes) <= {
            ("scope", "row"),
            ("scope", "col"),
            ("style", "white-space: nowrap"),
        }  # no colour
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data}\n"
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first):
        return next(row[1:] for row in self.rows if row[0] == first)


def shown(value):
    text = value._repr_html_()
    assert len(text) < 40_000
    assert "<script" not in text
    return Parsed(text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    params = {HOSTILE: jnp.ones(100), "key": jax.random.key(0)}
    directory = tmp_path_factory.mktemp("saved")
    with CheckpointManager(directory, metadata={HOSTILE: [HOSTILE]}) as manager:
        for step in range(1, 26):
            given = {"extras": {"ema": {HOSTILE: np.ones(3)}, "note": HOSTILE}, "metrics": {HOSTILE: 1 / step}}
            manager.save(step, params, {"mu": np.ones(5)}, **given)
    return directory


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / HOSTILE.replace("/", ""))


def test_a_manager_shows_its_newest_steps_and_how_many_more(run):
    with CheckpointManager(run, keep=[ckptmgr.latest(100)]) as manager:
        manager.pin(20)
        manager.distrust(24, HOSTILE)
        (run / "25" / "manifest.json").write_text("{")
        page = shown(manager)
        assert f"{run}, open for writing, 25 steps" in page.text
        assert [row[0] for row in page.rows] == ["step", *map(str, range(25, 5, -1))]
        assert "5 more steps" in page.text
        assert "manifest.json is damaged" in page.row("25")[-1]
        assert page.row("24")[-1] == f"distrusted: {HOSTILE}"
        saved, size, metrics, kept = page.row("20")
        assert saved.endswith(" UTC")
        assert (size, metrics) == ("472 B", f"{HOSTILE}=0.05")
        assert {"pinned", "latest(n=100)"} <= set(kept.split(", "))
    assert shown(manager).rows == page.rows
    assert "read-only or closed" in shown(manager).text
    assert len(shown(CheckpointManager(run, read_only=True)).rows) == 21


def test_an_empty_run_one_that_is_gone_and_one_that_is_being_written(tmp_path):
    assert "0 steps" in shown(CheckpointManager(tmp_path / "nothing", read_only=True)).text
    with CheckpointManager(tmp_path / "run", keep=2) as manager:
        reader = CheckpointManager(tmp_path / "run", read_only=True)
        for step in range(1, 9):
            manager.save(step, {"w": np.full(10_000, step)})
            for _ in range(5):  # while it is written, and older steps are deleted
                assert len(shown(reader).rows) <= 5
                assert "open for writing" in shown(manager).text
    assert [row[0] for row in shown(reader).rows] == ["step", "8", "7"]
    shutil.rmtree(tmp_path / "run")
    assert "0 steps" in shown(reader).text


OPENED = []
sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event == "open" else None)


def test_a_manager_reads_no_array_to_be_shown(run):
    reader = CheckpointManager(run, read_only=True)
    OPENED.clear()
    shown(reader)
    assert len({path for path in OPENED if path.endswith("manifest.json")}) == 25
    assert not [path for path in OPENED if "/d/" in path or "ocdbt" in path]


def test_a_checkpoint_and_what_is_known_of_it(run):
    manager = CheckpointManager(run, read_only=True)
    (run / "25" / "manifest.json").write_text("{")
    template = {HOSTILE: jnp.ones(100), "key": jax.random.key(1), "new": jnp.ones(2)}
    page = shown(manager.restore(params=template, extras={"ema": None, "note": None}, partial=True))
    assert "step 24, restored" in page.text
    assert page.row("params") == ["3", "416 B"]
    assert page.row("ema") == ["1", "24 B"]
    assert page.row(HOSTILE) == [str(1 / 24)]
    assert page.row("source") == [str(run)]
    assert "manifest.json is damaged" in page.row("25")[0]
    assert ["params['new']"] in page.rows
    info = shown(manager.info(24))
    assert info.row("params") == ["2", "408 B"]
    assert info.row("note") == ["", ""]
    assert info.row("arrays") == ["472 B"]
    assert [row for row in info.rows if row == [HOSTILE, f"[{HOSTILE!r}]"]]


def test_a_new_run_shows_what_it_starts_with(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        page = shown(manager.restore_or(params={"w": jnp.ones(4)}, optimizer=optax.sgd(1.0)))
    assert "step 0, the start of a new run" in page.text
    assert page.row("params") == ["1", "16 B"]


def test_reports_and_differences(run):
    manager = CheckpointManager(run, read_only=True)
    report = manager.verify(3)
    page = shown(report)
    assert "step 3 is whole" in page.text
    assert page.row("files") == [str(report.files)]
    page = shown(VerifyReport(step=3, damages=(Damage(HOSTILE, "its bytes differ"),) * 500, unchecked=("a",)))
    assert "step 3 is damaged" in page.text
    assert page.rows.count([HOSTILE, "its bytes differ"]) == 20
    assert "480 more damages" in page.text
    page = shown(manager.diff(3, params={HOSTILE: jnp.ones(7)}))
    assert "2 leaves differ" in page.text
    assert page.row(f"params[{HOSTILE!r}]") == ["float32[100]", "float32[7]", "shape"]
    assert "no leaf differs" in shown(StructureDiff()).text


def test_ten_thousand_leaves_are_a_small_page():
    tree = {f"layer {n}": np.ones(1) for n in range(10_000)}
    many = {f"{n} {HOSTILE * 99}": HOSTILE * 99 for n in range(10_000)}
    info = CheckpointInfo(step=7, time=1e18, items=("params", *map(str, range(10_000))), nbytes=10**12,
                          leaves={"params": (SPEC,) * 10_000}, metrics=many, metadata=many)  # fmt: skip
    page = shown(info)
    assert page.row("params") == ["10,000", "10.5 GB"]
    assert "9,980 more metrics" in page.text
    assert "9,981 more items" in page.text
    skipped = dict.fromkeys(range(10_000), HOSTILE)
    page = shown(ckptmgr.Checkpoint(step=7, params=tree, extras=many, skipped=skipped, missing=tuple(many)))
    assert page.row("params") == ["10,000", "80.0 kB"]
    assert shown(StructureDiff((LeafDiff(HOSTILE, SPEC, None, "unexpected"),) * 10_000)).rows


class Unspeakable:
    def __str__(self):
        raise RuntimeError(HOSTILE)


def test_what_cannot_be_shown_is_said():
    page = shown(CheckpointInfo(step=7, time=0.0, metadata={"bad": Unspeakable(), "odd": "\udce9"}))
    assert page.text.startswith("CheckpointInfo(step=7")
    assert HOSTILE in page.text
    odd = CheckpointInfo(step=7, time=0.0, metadata={"odd": "\udce9"})  # of a file's name: no text in UTF-8
    assert "udce9" in odd._repr_html_().encode().decode()


def test_ipython_shows_it(run):
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(CheckpointManager(run, read_only=True))
    assert "5 more steps" in Parsed(data["text/html"]).text
    assert data["text/plain"].startswith("CheckpointManager(")
