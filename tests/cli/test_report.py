"""The report of a run, in a real browser: Debian's packages chromium and chromium-driver."""

import os
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import ckptmgr
from ckptmgr.cli import report
from ckptmgr.format import manifest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from selenium import webdriver

pytestmark = pytest.mark.xdist_group("browser")
EVIL = "<script>document.title='run'</script> \u00e9\u6771"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(found.values()):
        assert "CI" not in os.environ, found
        pytest.skip("the report is looked at with a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "hide-scrollbars",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run in which everything has happened once."""
    run = tmp_path_factory.mktemp("eventful")
    params = {"w": jnp.ones((40, 50)), EVIL: np.ones(3), **{f"b{at}": np.ones(2) for at in range(30)}}
    keep = [ckptmgr.latest(3), ckptmgr.best("loss")]
    with ckptmgr.CheckpointManager(run, keep=keep, metadata={"git": EVIL}) as manager:
        for step in range(10, 100, 10):
            loss = float("nan") if step == 50 else 1 / step
            manager.save(step, params, metrics={"loss": loss, EVIL: step})
        manager.wait()
        manager.pin(70)
        (run / "90" / "manifest.json").write_bytes(b"")
        assert manager.restore().step == 80
    return written(run)


def written(run):
    file = run.parent / f"{run.name}.html"
    file.write_text(report.html(ckptmgr.CheckpointManager(run, read_only=True)), encoding="ascii")
    return file


def opened(browser, page, width=1000, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"file://{page}")
    return browser


def test_it_shows_what_the_run_holds_logs_no_error_and_asks_for_nothing(browser, page):
    opened(browser, page)
    said = browser.find_element("tag name", "body").text
    for words in (
        "2 checkpoints", "9", "loss", "latest(n=3)", "best(metric='loss'", "(pinned)", "passed over in a restore",
        "seconds until durable", "megabytes saved per second", "seconds of work at risk", "12 smaller leaves",
        "params['w']", EVIL, "1 values are NaN or infinite", "manifest.json",
    ):  # fmt: skip
        assert words in said, words
    titles = [each.get_attribute("textContent") for each in browser.find_elements("css selector", "svg g title")]
    assert any(title.startswith("step 20: saved, then deleted") for title in titles)
    assert any(title.startswith("step 80: restored") for title in titles)
    assert browser.title == f"{page.stem}: checkpoints"  # the name of no leaf and no metric was run
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [each for each in browser.get_log("browser") if each["level"] in ("SEVERE", "WARNING")] == []


CONTRAST = """
const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
const page = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll('h1,h2,h3,p,dt,dd,th,td,li,svg text')].map(e => {
    const style = getComputedStyle(e), ink = light(e.closest('svg') ? style.fill : style.color);
    return (Math.max(ink, page) + .05) / (Math.min(ink, page) + .05) });
"""


@pytest.mark.parametrize("width", [1000, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_the_light_in_the_dark_and_on_a_phone(scheme, width, browser, page):
    opened(browser, page, width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    contrasts = browser.execute_script(CONTRAST)
    assert len(contrasts) > 50
    assert min(contrasts) >= 4.5
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_marks_differ_by_shape(page):
    shapes = [shape.split("class=")[0] for _, shape in report._SHAPES.values()]
    assert len(set(shapes)) == len(shapes)


def test_a_run_without_checkpoints_and_one_without_a_journal(browser, tmp_path):
    with ckptmgr.CheckpointManager(tmp_path / "empty"):
        pass
    assert "Nothing has been saved yet" in opened(browser, written(tmp_path / "empty")).page_source
    with ckptmgr.CheckpointManager(tmp_path / "stock") as manager:
        manager.save(1, {"w": np.ones(3)})
    (tmp_path / "stock" / ".ckptmgr" / "journal.jsonl").unlink()
    assert "the run has no journal" in opened(browser, written(tmp_path / "stock")).page_source
    assert [each for each in browser.get_log("browser") if each["level"] == "SEVERE"] == []


def test_a_long_run_stays_a_small_file(browser, tmp_path):
    with ckptmgr.CheckpointManager(tmp_path / "long", keep=2) as manager:
        manager.save(1, {"w": np.ones(3)}, metrics={"loss": 1.0})
        manager.wait()
        for step in range(2, 5000):
            manager._journal.record(
                "saved", step, nbytes=12, durable_s=0.1, blocked_s=0.01, metrics={"loss": 1 / step}
            )
            manager._journal.record("deleted", step - 1, why="no policy keeps it")
    page = written(tmp_path / "long")
    assert page.stat().st_size < 500_000
    assert "Only one of 17 is shown" in opened(browser, page).page_source


def test_a_step_of_a_newer_format_needs_a_newer_ckptmgr_and_is_not_damaged(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.ones(3)})
    path = tmp_path / "2" / "manifest.json"
    body = path.read_bytes().replace(b'"format":1', b'"format":9').rpartition(b',"crc32"')[0]
    path.write_bytes(body + manifest._seal(body))
    page = report.html(ckptmgr.CheckpointManager(tmp_path, read_only=True))
    assert page.count("<td>needs a newer ckptmgr</td>") == 2  # among the troubles, and on disk
    assert "on disk, needs a newer ckptmgr" in page
    assert "on disk, damaged" not in page
    assert "<td>damaged" not in page


def test_a_rewind_is_shown(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.ones(3)}).result()
        manager.rewind(2)
    assert "<title>step 2: gone back to</title>" in report.html(
        ckptmgr.CheckpointManager(tmp_path, read_only=True)
    )


@pytest.mark.parametrize(
    "event", ["saved", "failed", "deleted", "rewound", "passed over", "restored", "paced", "invented"]
)
def test_an_event_that_says_no_more_than_its_step_is_shown_or_left_out(event, tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.ones(3)}, metrics={"loss": 1.0}).result()
        manager._journal.record(event, 7)
    page = report.html(ckptmgr.CheckpointManager(tmp_path, read_only=True))
    assert ("step 7" in page) == (event not in ("saved", "paced", "invented"))
