"""The report of a run, in a real browser: Debian's packages chromium and chromium-driver."""

import itertools
import json
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import warm
from conftest import ON_CI
from etils import epath

import ckptmgr
from ckptmgr import cli
from ckptmgr.cli import report
from ckptmgr.cli.report import changes, charts, page, sizes, words
from ckptmgr.format import manifest
from ckptmgr.run import history, journal
from ckptmgr.specs import LeafSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.xdist_group("browser")
EVIL = "<b>1</b><script>document.title='run'</script><!-- </SCRIPT> [bold]{0}%{y} \"'& \u00e9\u6771"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(found.values()):
        assert not ON_CI, found
        pytest.skip("the report is looked at with a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "hide-scrollbars",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    driver.execute_cdp_cmd("Network.enable", {})
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """A run in which everything has happened once."""
    run = tmp_path_factory.mktemp("eventful")
    params = {"w": jnp.ones((40, 50)), EVIL: np.ones(3), **{f"b{at}": np.ones(2) for at in range(50)}}
    keep = [ckptmgr.latest(3), ckptmgr.best("loss")]
    with ckptmgr.CheckpointManager(run, keep=keep, metadata={"git": EVIL}) as manager:
        for step in range(10, 100, 10):
            loss = float("nan") if step == 50 else 1 / (step - 5)
            metrics = {"loss": loss, EVIL: step, "below": -1.0}
            manager.save(step, params, extras={"more": {"x": np.ones(9)}}, metrics=metrics)
        manager.wait()
        manager.pin(70)
        (run / "90" / "manifest.json").write_bytes(b"")
        assert manager.restore().step == 80
    return run


@pytest.fixture(scope="module")
def eventful_page(eventful):
    return written(eventful)


def written(run):
    file = run.parent / f"{run.name}.html"
    file.write_text(made(run), encoding="ascii")
    return file


def made(run):
    return report.html(ckptmgr.CheckpointManager(run, read_only=True))


def drawn(html):
    """The charts in a page, by their id."""
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', html, re.DOTALL)
    return {chart["id"]: chart for chart in json.loads(found[1])["charts"]}


def looks(browser, width=1000, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def opened(browser, file):
    looks(browser)
    browser.get_log("performance")
    browser.get(f"file://{file}")
    return browser


@pytest.fixture
def shown(browser, eventful_page):
    """The browser with the report of the eventful run as it is when it is opened."""
    return opened(browser, eventful_page)


@pytest.fixture
def still(browser, eventful_page):
    """The same for a test that changes nothing in it: several of them in a row share it."""
    if browser.current_url != eventful_page.as_uri() or not browser.execute_script("return window.isStill"):
        opened(browser, eventful_page)
        browser.execute_script("window.isStill = true")
    return browser


def wait_until(browser, is_so):
    return WebDriverWait(browser, 20, 0.05).until(is_so)


def press(browser, choice):
    button = browser.find_element(By.CSS_SELECTOR, f"[data-to={choice}]")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    pressed = f"[data-set={button.get_attribute('data-set')}][aria-pressed=true]"
    assert len(browser.find_elements(By.CSS_SELECTOR, pressed)) == 1


def axis(browser, chart, name="xaxis"):
    found = "const a = document.getElementById(arguments[0])._fullLayout[arguments[1]];"
    return browser.execute_script(
        found + "return {type: a.type, range: a.range, title: a.title.text}", chart, name
    )


def all_text(browser):
    return browser.execute_script("return document.body.querySelector('main').textContent")


def complaints(browser):
    return [each for each in browser.get_log("browser") if each["level"] in ("SEVERE", "WARNING")]


def asked_for(browser):
    """The addresses that the browser has asked for since a page was opened."""
    told = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    sent = [each["params"]["request"]["url"] for each in told if each["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("file:", "data:"))]


# ---------------------------------------------------------------- what it shows


def test_it_shows_what_the_run_holds_logs_no_error_and_asks_for_nothing(still, eventful_page):
    said = all_text(still)
    for expected in (
        "2 checkpoints", "latest(n=3)", "best(metric='loss'", "pinned", "passed over in a restore",
        "seconds until durable", "bytes saved per second", "seconds at risk before", "12 smaller",
        "float32[40,50]", EVIL, "1 value is NaN or infinite", "manifest.json", "step 20: saved, then deleted",
        "step 80: restored", "best (lowest)",
    ):  # fmt: skip
        assert expected in said, expected
    assert still.title == f"{eventful_page.stem}: checkpoints"  # the name of no leaf and no metric was run
    assert len(still.find_elements(By.TAG_NAME, "script")) == 3
    assert still.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert still.find_elements(By.CSS_SELECTOR, "main b, svg a, svg [style*=bold]") == []
    assert asked_for(still) == []
    assert complaints(still) == []


def test_every_chart_is_drawn_with_axes_ticks_and_its_names(still):
    found = drawn(still.page_source)
    assert {"timeline", "metric-0", "sizes", "seconds", "throughput", "on-disk", "risk"} <= found.keys()
    for name, chart in found.items():
        place = still.find_element(By.ID, name)
        assert place.find_elements(By.CSS_SELECTOR, "svg.main-svg"), name
        if chart["kind"] == "treemap":
            assert "more" in place.get_attribute("textContent")
        else:
            assert len(place.find_elements(By.CSS_SELECTOR, ".xtick")) > 2, name
            assert len(place.find_elements(By.CSS_SELECTOR, ".ytick")) > 1, name
            points = sum(y is not None for trace in chart["traces"] for y in trace["y"])
            assert len(place.find_elements(By.CSS_SELECTOR, ".points path")) == points, name
    assert EVIL[:20] in still.find_element(By.CSS_SELECTOR, "#metric-1 .legend").get_attribute("textContent")


def test_the_best_step_is_marked(still):
    (trace,) = [each for each in drawn(still.page_source)["metric-0"]["traces"] if each["symbol"] == "star"]
    assert (trace["name"], trace["step"], trace["y"]) == ("best: step 90", [90], [float(f"{1 / 85:.9g}")])
    legend = still.find_element(By.CSS_SELECTOR, "#metric-0 .legend").get_attribute("textContent")
    assert "best: step 90" in legend


def test_without_a_policy_the_lowest_and_the_highest_are_marked(still):
    names = [trace["name"] for trace in drawn(still.page_source)["metric-1"]["traces"]]
    assert names[1:] == ["lowest: step 10", "highest: step 90"]


def test_it_has_headings_in_order_labels_and_headed_tables(still):
    levels = [int(each.tag_name[1]) for each in still.find_elements(By.CSS_SELECTOR, "h1,h2,h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert still.execute_script("return document.documentElement.lang") == "en"
    counts = still.execute_script("""
        const all = which => document.querySelectorAll(which).length;
        return {charts: all('.chart'), labelled: all('.chart[role=img][aria-label]'),
            ths: all('th'), scoped: all('thead th[scope=col], tbody th[scope=row]'),
            tables: all('table'), captions: all('caption'),
            rows: all('tbody tr'), headed: all('tbody tr > th:first-child'),
            links: [...document.querySelectorAll('nav a')].map(a => !!document.getElementById(a.hash.slice(1)))}
    """)
    assert counts["charts"] == counts["labelled"] > 6
    assert counts["ths"] == counts["scoped"] > 50
    assert counts["tables"] == counts["captions"]
    assert counts["rows"] == counts["headed"]
    assert len(counts["links"]) > 6
    assert all(counts["links"])


def test_without_scripts_every_value_stands_in_a_table(browser, eventful_page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, eventful_page)
        visible = browser.find_element(By.TAG_NAME, "main").text
        assert "Without scripts no chart is drawn" in visible
        assert not any(each.is_displayed() for each in browser.find_elements(By.CSS_SELECTOR, ".chart, .tools"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    for chart in drawn(browser.page_source).values():
        for trace in chart.get("traces", ()):
            if chart["kind"] == "marks":
                assert all(text[:60] in visible for text in trace["text"] if EVIL not in text)
            elif chart.get("unit") in (None, "s"):
                digits = 4 if chart.get("unit") else 6
                assert all(y is None or f"{y:.{digits}g}" in visible for y in trace["y"]), trace["name"]
    for said in ("nan", "b10", "float32[40,50]", "B/s", "damaged"):
        assert said in visible


CONTRAST = """
const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
const page = light(getComputedStyle(document.body).backgroundColor);
const plain = 'h1,h2,h3,p,dt,dd,th,td,li,a,summary,caption,.xtick text,.ytick text,.legendtext,.xtitle';
const ratio = (one, other) => (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
const found = [...document.querySelectorAll(plain)].map(e => {
    const style = getComputedStyle(e);
    return ratio(light(e.closest('svg') ? style.fill : style.color), page) });
const buttons = [...document.querySelectorAll('.tools button')].map(e => {
    const style = getComputedStyle(e);
    return ratio(light(style.color), light(style.backgroundColor)) });
const sizes = [...document.querySelectorAll('#sizes .slice')].map(e => {
    const fill = part => light(getComputedStyle(e.querySelector(part)).fill);
    return e.querySelector('text') ? ratio(fill('text'), fill('path')) : 21 });
return [...found, ...buttons, ...sizes];
"""


def background(browser):
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def paper(browser):
    return browser.execute_script(
        "return getComputedStyle(document.querySelector('#risk svg.main-svg')).backgroundColor"
    )


WHITE, BLACK = "rgb(255, 255, 255)", "rgb(15, 20, 25)"


def test_it_follows_the_system_into_the_dark_and_back_and_fits_a_phone(shown):
    for scheme, width in (("light", 1000), ("dark", 1000), ("dark", 360), ("light", 360)):
        looks(shown, width, scheme)
        colour = BLACK if scheme == "dark" else WHITE
        wait_until(shown, lambda browser, colour=colour: paper(browser) == background(browser) == colour)
        wait_until(shown, lambda browser, most=width: chart_width(browser) < most)
        assert shown.execute_script("return document.documentElement.scrollWidth") <= width
        contrasts = shown.execute_script(CONTRAST)
        assert len(contrasts) > 200
        assert min(contrasts) >= 4.5


def chart_width(browser):
    script = "return document.querySelector('#risk svg.main-svg').getBoundingClientRect().width"
    return browser.execute_script(script)


def test_it_shows_where_the_run_was_resumed(shown, eventful):
    script = "return document.getElementById('metric-0')._fullLayout.shapes.map(each => each.x0)"
    assert shown.execute_script(script) == [80]
    press(shown, "time")
    (resumed,) = shown.execute_script(script)
    (told,) = [each for each in journal.read(epath.Path(eventful)) if each["event"] == "restored"]
    assert resumed[:16] == time.strftime("%Y-%m-%d %H:%M", time.gmtime(told["time"]))


def test_marks_differ_by_shape():
    assert len({kind.symbol for kind in charts.KINDS.values()}) == len(charts.KINDS)


# ---------------------------------------------------------------- by clicking


def test_a_click_makes_the_scale_logarithmic_and_another_one_linear(shown):
    assert axis(shown, "metric-0", "yaxis")["type"] == "linear"
    press(shown, "log")
    assert axis(shown, "metric-0", "yaxis")["type"] == "log"
    assert axis(shown, "seconds", "yaxis")["type"] == "log"
    below = next(name for name, each in drawn(shown.page_source).items() if each["title"] == "below")
    told = axis(shown, below, "yaxis")
    assert (told["type"], told["range"]) == ("linear", [-1.5, -0.5])  # it has no value above 0, and is always -1
    assert axis(shown, "timeline", "yaxis")["type"] == "category"
    press(shown, "linear")
    assert axis(shown, "metric-0", "yaxis")["type"] == "linear"
    assert complaints(shown) == []


def test_a_click_shows_time_instead_of_steps(shown):
    told = axis(shown, "metric-0")
    assert (told["type"], told["title"]) == ("linear", "step")
    press(shown, "time")
    for name, chart in drawn(shown.page_source).items():
        if chart["kind"] != "treemap":
            told = axis(shown, name)
            assert (told["type"], told["title"]) == ("date", "time (UTC)"), name
            times = [time for trace in chart["traces"] for time in trace["time"]]
            year = time.gmtime(min(times) / 1000).tm_year
            assert told["range"][0].startswith((str(year), str(year - 1))), name
    press(shown, "step")
    assert axis(shown, "risk")["title"] == "step"
    assert complaints(shown) == []


def mouse(browser, kind, x, y, **more):
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **more})


def in_sight(browser, chart):
    """The rectangle of the area in which a chart draws, scrolled into sight."""
    script = """
        document.getElementById(arguments[0]).scrollIntoView({block: "center"});
        const found = document.querySelector(`#${arguments[0]} .nsewdrag`).getBoundingClientRect();
        return [found.left, found.top, found.width, found.height]
    """
    return browser.execute_script(script, chart)


def test_dragging_zooms_and_a_double_click_zooms_out(shown):
    left, top, width, height = in_sight(shown, "metric-0")
    whole = axis(shown, "metric-0")["range"]
    y = top + height / 2
    button = {"button": "left", "buttons": 1, "clickCount": 1}
    mouse(shown, "mousePressed", left + width * 0.4, y, **button)
    for share in (0.45, 0.5, 0.55, 0.6):
        mouse(shown, "mouseMoved", left + width * share, y, button="left", buttons=1)
    mouse(shown, "mouseReleased", left + width * 0.6, y, **(button | {"buttons": 0}))
    wait_until(shown, lambda browser: axis(browser, "metric-0")["range"] != whole)
    low, high = axis(shown, "metric-0")["range"]
    span = whole[1] - whole[0]
    assert abs((low - whole[0]) / span - 0.4) < 0.05
    assert abs((high - whole[0]) / span - 0.6) < 0.05
    press(shown, "dark")
    assert axis(shown, "metric-0")["range"] == [low, high]  # other colours leave the zoom as it is
    press(shown, "auto")
    left, top, width, height = in_sight(shown, "metric-0")
    for count in (1, 2):
        mouse(shown, "mousePressed", left + width / 2, top + height / 2, **(button | {"clickCount": count}))
        mouse(
            shown,
            "mouseReleased",
            left + width / 2,
            top + height / 2,
            **(button | {"clickCount": count, "buttons": 0}),
        )
    wait_until(shown, lambda browser: axis(browser, "metric-0")["range"] == whole)


def under_the_pointer(browser, chart, trace, point):
    in_sight(browser, chart)
    script = """
        const traces = document.querySelectorAll(`#${arguments[0]} .scatterlayer .trace`);
        const box = traces[arguments[1]].querySelectorAll(".points path")[arguments[2]].getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2]
    """
    x, y = browser.execute_script(script, chart, trace, point)
    mouse(browser, "mouseMoved", x - 3, y + 3)
    mouse(browser, "mouseMoved", x, y)
    place = f"#{chart} .hoverlayer .hovertext"
    return wait_until(
        browser,
        lambda page: "\n".join(
            each.get_attribute("textContent") for each in page.find_elements(By.CSS_SELECTOR, place)
        ),
    )


def test_a_point_says_its_step_its_value_and_when(shown):
    said = under_the_pointer(shown, "metric-0", 0, 1)
    for expected in ("step 20", "loss: 0.0666667", "UTC", str(time.gmtime().tm_year)):
        assert expected in said
    mouse(shown, "mouseMoved", 1, 1)
    assert EVIL[:20] in under_the_pointer(shown, "metric-1", 0, 1)
    traces = [trace["symbol"] for trace in drawn(shown.page_source)["timeline"]["traces"]]
    said = under_the_pointer(shown, "timeline", traces.index("triangle-down"), 0)
    assert "step 90: passed over in a restore" in said
    assert complaints(shown) == []


def test_a_click_chooses_the_colours_whatever_the_system_says(shown):
    press(shown, "dark")
    wait_until(shown, lambda browser: paper(browser) == background(browser) == BLACK)
    press(shown, "light")
    looks(shown, scheme="dark")
    wait_until(shown, lambda browser: paper(browser) == background(browser) == WHITE)
    press(shown, "auto")
    wait_until(shown, lambda browser: paper(browser) == background(browser) == BLACK)


def test_a_table_opens_with_a_click_and_no_button_sends_anything_away(shown):
    assert not any(each.get_attribute("open") for each in shown.find_elements(By.TAG_NAME, "details"))
    summary = shown.find_element(By.CSS_SELECTOR, "details summary")
    summary.click()
    assert summary.find_element(By.XPATH, "..").get_attribute("open")
    offered = {
        each.get_attribute("data-title").lower() for each in shown.find_elements(By.CSS_SELECTOR, ".modebar-btn")
    }
    assert offered == {"download plot as a png", "zoom in", "zoom out", "reset axes"}


# ---------------------------------------------------------------- other runs


def test_a_run_without_checkpoints_and_one_without_a_journal(browser, tmp_path):
    with ckptmgr.CheckpointManager(tmp_path / "empty"):
        pass
    assert "Nothing has been saved yet" in opened(browser, written(tmp_path / "empty")).page_source
    with ckptmgr.CheckpointManager(tmp_path / "stock") as manager:
        manager.save(1, {"w": np.ones(3)})
    (tmp_path / "stock" / ".ckptmgr" / "journal.jsonl").unlink()
    assert "the run has no journal" in opened(browser, written(tmp_path / "stock")).page_source
    assert browser.find_elements(By.CSS_SELECTOR, "#sizes svg.main-svg")
    assert complaints(browser) == []


def tell(run, events):
    """Writes events into the journal of a run, a second apart."""
    with open(run / ".ckptmgr" / "journal.jsonl", "a") as journal:
        for second, event in enumerate(events):
            journal.write(json.dumps({"time": 1e9 + second} | event) + "\n")


def test_a_long_run_stays_a_small_file(browser, tmp_path):
    """10,000 saves, and failures that say much; the best of a metric is shown although few others are."""
    with ckptmgr.CheckpointManager(tmp_path / "long", keep=[ckptmgr.latest(2), ckptmgr.best("loss")]) as manager:
        manager.save(1, {"w": np.ones(3)}, metrics={"loss": 10.0})
    events = []
    for step in range(2, 10_001):
        loss = -1.0 if step == 4567 else 1 / step
        facts = {"nbytes": 12, "disk_nbytes": 20, "durable_s": 0.1, "blocked_s": 0.01, "keep": ["best:loss:min:1"]}
        events.append({"event": "saved", "step": step, "metrics": {"loss": loss}} | facts)
        events.append({"event": "deleted", "step": step - 1, "why": "no policy keeps it"})
        events += [{"event": "failed", "step": step, "why": "a disk is full " * 1000}] * (step % 20 == 0)
    tell(tmp_path / "long", events)
    file = written(tmp_path / "long")
    assert file.stat().st_size < page.MOST_BYTES
    found = drawn(file.read_text())
    assert all(len(trace["y"]) <= 602 for chart in found.values() for trace in chart.get("traces", ()))
    assert any(trace["name"] == "best: step 4567" for trace in found["metric-0"]["traces"])
    assert 4567 in found["metric-0"]["traces"][0]["step"]
    assert "Only one of 34 is shown" in opened(browser, file).page_source
    assert len(browser.find_elements(By.CSS_SELECTOR, "#metric-0 .points path")) > 290
    assert complaints(browser) == []


def test_a_file_that_would_be_too_large_has_fewer_points(tmp_path):
    names = [f"{'long' * 70}{at}" for at in range(300)]
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, {name: np.ones(2) for name in names}, metrics=dict.fromkeys(names, 1.0))
    for step in range(2, 400):
        saved = {"event": "saved", "step": step, "metrics": dict.fromkeys(names, 1 / step)}
        tell(tmp_path, [saved, {"event": "failed", "step": step, "why": "\u6771" * 3000}])
    html = made(tmp_path)
    assert len(html) <= page.MOST_BYTES
    assert "Only one of 4 is shown" in html
    assert "Not drawn" in html


def test_a_step_of_a_newer_format_needs_a_newer_ckptmgr_and_is_not_damaged(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.ones(3)})
    path = tmp_path / "2" / "manifest.json"
    body = path.read_bytes().replace(b'"format":1', b'"format":9').rpartition(b',"crc32"')[0]
    path.write_bytes(body + manifest._seal(body))
    html = made(tmp_path)
    assert html.count("<td>needs a newer ckptmgr</td>") == 2  # among the troubles, and on disk
    assert "on disk, needs a newer ckptmgr" in html
    assert "on disk, damaged" not in html
    assert "<td>damaged" not in html


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
    """A run that has gone back to step 2, which is distrusted, and has saved step 3 again."""
    run = tmp_path_factory.mktemp("rewound")
    with ckptmgr.CheckpointManager(run, keep=ckptmgr.best("loss")) as manager:
        for step in (1, 2, 3, 4):
            manager.save(step, {"w": np.ones(3)}, metrics={"loss": 10.0 - step}, force=True).result()
            manager.pin(step)
        manager.rewind(2)
        manager.distrust(2, "wrong <data>")
        manager.save(3, {"w": np.ones(3)}, metrics={"loss": 9.5}).result()
    return run


def test_a_line_goes_from_left_to_right_over_steps_and_over_time(browser, rewound):
    opened(browser, written(rewound))
    xs = "return document.getElementById('seconds').data[0].x"
    assert browser.execute_script(xs) == [1, 2, 3, 3, 4]
    times = drawn(browser.page_source)["seconds"]["traces"][0]["time"]
    press(browser, "time")
    assert browser.execute_script(xs) == sorted(times)


def test_steps_that_were_set_aside_or_are_distrusted_are_shown(rewound):
    html = made(rewound)
    for said in (
        "step 2: gone back to", "step 4: set aside by a rewind: the run went back to step 2",
        "step 2: on disk, distrusted: wrong &lt;data&gt;", "step 2: distrusted: wrong &lt;data&gt;",
    ):  # fmt: skip
        assert f"<td>{said}</td>" in html, said
    assert '<tr><th scope="row">3, 4</th><td>2</td>' in html
    traces = {trace["name"]: trace for trace in drawn(html)["metric-0"]["traces"]}
    assert traces["loss"]["step"] == [1, 2, 3]
    assert (traces["set aside by a rewind"]["step"], traces["set aside by a rewind"]["y"]) == ([3, 4], [7, 6])
    assert traces["distrusted"]["step"] == [2]
    assert "best: step 1" in traces  # lower is step 2, which is distrusted, and the two that were set aside


def test_steps_that_come_back_are_again_of_the_run(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.ones(3)}, metrics={"loss": step}).result()
        manager.rewind(1)
        manager.rewind(3)
        manager.delete(2)
    html = made(tmp_path)
    assert drawn(html)["metric-0"]["traces"][0]["step"] == [1, 2, 3]
    assert "No step: no rewind has set any aside" in html


EVENTS = ["saved", "failed", "deleted", "rewound", "passed over", "restored", "paced", "distrusted", "invented"]


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_that_says_no_more_than_its_step_is_shown_or_left_out(event, tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.ones(3)}, metrics={"loss": 1.0}).result()
        manager._journal.record(event, 7)
    assert ("step 7" in made(tmp_path)) == (event not in ("saved", "paced", "invented"))


VALUES = [None, "text", 1e999, 10**400, -5, [], {"a": [1]}, [None], True]
FIELDS = ("nbytes", "disk_nbytes", "blocked_s", "durable_s", "interval_s", "why", "source", "metrics", "set_aside",
          "returned", "keep")  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_with_values_of_other_types_breaks_nothing(event, tmp_path):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.ones(3)}, metrics={"loss": 1.0}).result()
    tell(tmp_path, [{"event": event, "step": 7} | dict.fromkeys(FIELDS, value) for value in VALUES])
    for moment in (1e18, -1e18, float("nan"), 1e300, 10**400):
        tell(tmp_path, [{"event": event, "step": 8, "time": moment}])
    charts = drawn(made(tmp_path))
    assert charts["metric-0"]["traces"][0]["y"] == [1.0]
    assert {"timeline", "sizes", "seconds"} <= charts.keys()


def test_a_run_with_local_saves(tmp_path):
    with ckptmgr.CheckpointManager(tmp_path / "run", local=tmp_path / "local", save_every=10) as manager:
        for step in range(1, 13):
            manager.save(step, {"w": np.ones(3)}, metrics={"loss": 1 / step})
    with ckptmgr.CheckpointManager(tmp_path / "run", local=tmp_path / "local", save_every=10) as manager:
        assert manager.restore().step == 12
    html = made(tmp_path / "run")
    assert f"step 12: restored, or resumed from: from {tmp_path / 'local'}" in html
    assert drawn(html)["metric-0"]["traces"][0]["step"] == [10]


def saved_in_all(html):
    found = re.search(r"<dt>saved in all</dt><dd>(\d+)</dd>", html)
    return int(found[1]) if found else 0  # the journal is written after a save is told durable


def test_it_is_made_while_the_run_is_written_to(tmp_path):
    over = threading.Event()
    with ckptmgr.CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(0, {"w": np.ones(3)}).result()

        def write():
            for step in itertools.takewhile(lambda _: not over.is_set(), itertools.count(1)):
                manager.save(step, {"w": np.ones(3)}, metrics={"loss": 1 / step})

        writer = threading.Thread(target=write)
        writer.start()
        try:
            pages, ends = [made(tmp_path)], time.monotonic() + 60
            while saved_in_all(pages[-1]) < saved_in_all(pages[0]) + 3 and time.monotonic() < ends:
                pages.append(made(tmp_path))
        finally:
            over.set()
            writer.join()
    saved = [saved_in_all(html) for html in pages]
    assert saved == sorted(saved)
    assert saved[-1] > saved[0]
    assert not any("<dt>damaged</dt><dd>1" in html or "on disk, distrusted" in html for html in pages)


@pytest.mark.parametrize("reader", [history.History, ckptmgr.CheckpointManager])
def test_a_step_that_is_deleted_while_it_is_read_is_left_out(reader, tmp_path, monkeypatch):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.ones(3)})
    (tmp_path / "2" / "manifest.json").write_bytes(b"")
    name = "all" if reader is history.History else "info"
    read = getattr(reader, name)

    def read_and_delete(self, *step):
        try:
            return read(self, *step)
        finally:
            shutil.rmtree(tmp_path / "2")
            shutil.rmtree(tmp_path / "1")

    monkeypatch.setattr(reader, name, read_and_delete)
    infos, unread = report.survey(ckptmgr.CheckpointManager(tmp_path, read_only=True), None)
    assert [info.step for info in infos] == [3]
    assert unread == {}


def test_two_reports_of_a_run_differ_in_nothing_but_the_time(eventful):
    one, other = (re.sub(r"<dt>report made</dt><dd>[^<]*</dd>", "", made(eventful)) for _ in range(2))
    assert one == other
    assert "report made" not in one


def test_the_page_is_ascii_and_only_its_own_scripts_may_run(eventful_page):
    html = eventful_page.read_bytes()
    assert html.isascii()
    assert (
        len(re.findall(rb"<script", html.split(b"</style>")[1].split(b'<script type="application/json"')[0])) == 0
    )
    policy = re.search(rb'Content-Security-Policy" content="([^"]*)"', html)[1].decode()
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe" not in policy


# ---------------------------------------------------------------- the parts


def test_json_and_scripts_cannot_end_the_element_they_are_in():
    names = ["</script>", "<!--", "</SCRIPT ", "\u2028", "\ud800"]
    told = page._json(names)
    assert "<" not in told
    assert json.loads(told) == names
    assert page._for_html("'</script>' + /<!--/ + '\u00e9\U0001f600'") == (
        r"'\x3c/script>' + /\x3c!--/ + '\u00e9\ud83d\ude00'"
    )


def info(step, leaves, **more):
    return ckptmgr.CheckpointInfo(step=step, time=0.0, leaves=leaves, **more)


def leaf(*keys, shape=(4,), dtype="float32"):
    return LeafSpec("".join(f"[{key!r}]" for key in keys), keys, "jax", shape, dtype)


def test_what_a_step_differs_from_the_one_before_by():
    found = changes.changes([
        info(1, {"params": (leaf("w"), leaf("b"))}, metadata={"git": "a"}, versions={"jax": "1"}),
        info(2, {"params": (leaf("w"), leaf("b"))}, metadata={"git": "a"}, versions={"jax": "1"}),
        info(3, {"params": (leaf("w", shape=(5,)), leaf("b", dtype="bfloat16"))}, versions={"jax": "2"}),
        info(4, {"ema": (leaf("w"),), "params": (leaf("w", shape=(5,)),)}, versions={"jax": "2"}),
    ])  # fmt: skip
    assert [(change.step, change.before, bool(change)) for change in found] == [
        (2, 1, False),
        (3, 2, True),
        (4, 3, True),
    ]
    assert found[1].changed == [
        "params['w']: float32[4], now float32[5]",
        "params['b']: float32[4], now bfloat16[4]",
    ]
    assert found[1].around == ["git: a, now nothing", "jax: 1, now 2"]
    assert (found[2].added, found[2].removed, found[2].changed) == (["ema['w']"], ["params['b']"], [])


def test_what_changed_stands_in_the_report(tmp_path):
    for step, shape in ((1, 3), (2, 3), (3, 3), (4, 5)):
        with ckptmgr.CheckpointManager(tmp_path, metadata={"git": "new" if step == 4 else "old"}) as manager:
            manager.save(step, {"w": np.ones(shape)})
    html = made(tmp_path)
    assert '<th scope="row">2 to 3 (2 steps)</th><td>1</td><td>nothing</td>' in html
    assert "1 leaf of another shape or dtype (params[&#x27;w&#x27;]: float64[3], now float64[5])" in html
    assert "metadata and versions (git: old, now new)" in html


def test_sizes_add_up_and_few_of_many_are_shown():
    many = tuple(leaf("layers", at, name, shape=(at + 1,)) for at in range(300) for name in ("w", "b"))
    found = sizes.parts(info(1, {"params": many, "rng": (leaf("deep", *range(50)),)}), 100)
    assert sizes.total(found) == sum(map(manifest.leaf_nbytes, many)) + 16
    assert len(found) < 200
    for at, part in enumerate(found):
        inside = [each.nbytes for each in found if each.parent == at]
        assert not inside or sum(inside) == part.nbytes
        assert part.depth == (0 if part.parent < 0 else found[part.parent].depth + 1)
    names = {part.name for part in found}
    assert {"params.layers", "[299]", "260 smaller"} <= names
    assert any(name.startswith("rng.deep[0][1]") for name in names)


@pytest.mark.parametrize("leaves", [{}, {"params": ()}, {"params": (leaf("w", shape=(0,)),)}])
def test_a_checkpoint_without_bytes_has_no_sizes_to_draw(leaves):
    assert sizes.total(sizes.parts(info(1, leaves), 100)) == 0


def test_words_for_times_and_long_texts():
    assert words.when(1e9) == "2001-09-09 01:46:40 UTC"
    assert words.when(1e300) == "1e+300 s after 1970"
    assert len(words.shorten("x" * 1000)) < 310
    assert words.thinned(range(10), 5, keep=[3]) == ([0, 2, 3, 4, 6, 8, 9], "Only one of 2 is shown.")
    assert words.thinned([], 5) == ([], "")


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote_as_json_too(tmp_path, monkeypatch, capsys):
    with ckptmgr.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"w": np.ones(3)})
    run, file = str(tmp_path / "run"), str(tmp_path / "out.html")
    monkeypatch.setattr(sys, "argv", ["ckptmgr", "report", run, "-o", file, "--json"])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    assert json.loads(capsys.readouterr().out) == {"run": run, "file": file}
    assert Path(file).read_text(encoding="ascii").startswith("<!doctype html>")


def test_without_plotly_it_says_what_to_install(tmp_path, monkeypatch):
    with ckptmgr.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": np.ones(3)})
    page._scripts.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"pip install 'ckptmgr\[cli\]'"):
        made(tmp_path)


def test_the_command_line_begins_without_plotly():
    code = "import sys, ckptmgr.cli.app; sys.exit('plotly' in sys.modules)"
    assert warm.run(["-c", code]).returncode == 0


def test_scripts_and_styles_are_in_the_package():
    folder = Path(report.__file__).parent
    assert {path.name for path in folder.glob("page.*")} == {"page.py", "page.js", "page.css"}
