"""The page in headless Chromium; skipped where that, its driver or selenium is not installed."""

import io
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from matplotlib.image import imread
from test_report_page import HOSTILE, make_run

from megatron_vespo.page.serve import make_server
from megatron_vespo.report import main

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    page = tmp_path_factory.mktemp("page") / "report.html"
    main([str(make_run(page.parent / "a")), str(make_run(page.parent / "b")), "--output", str(page)])
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def count(browser: webdriver.Chrome) -> str:
    return browser.find_element("id", "count").text


def test_it_loads_without_errors_and_shows_text_as_text(browser: webdriver.Chrome) -> None:
    assert browser.get_log("browser") == []
    assert browser.find_elements("css selector", "canvas")
    assert not browser.find_elements("css selector", "main img")
    prompt = browser.find_element("css selector", ".prompt").get_attribute("textContent")
    assert prompt == HOSTILE


def test_filters(browser: webdriver.Chrome) -> None:
    assert count(browser).startswith("12 of 12")
    low = browser.find_element("name", "reward_min")
    low.send_keys("0.25")
    assert count(browser).startswith("4 of 12")
    low.clear()
    low.send_keys("7")
    assert "No sample fits" in browser.find_element("id", "sample-list").text
    low.clear()
    browser.execute_script("document.getElementById('filters').reset()")


def test_tokens_have_the_colour_of_their_difference(browser: webdriver.Chrome) -> None:
    colours = [
        span.value_of_css_property("background-color")
        for span in browser.find_elements("css selector", ".tokens span:not(.inserted)")[:2]
    ]
    assert colours == ["rgba(0, 114, 178, 0.376)", "rgba(0, 114, 178, 0)"]


def test_inserted_tokens_are_in_their_place_and_have_no_figures(browser: webdriver.Chrome) -> None:
    words = browser.find_elements("css selector", "#sample-list article:first-child .tokens span")
    assert [word.get_attribute("textContent") for word in words] == [HOSTILE, "<", ">", "b"]
    assert ["inserted" in word.get_attribute("class") for word in words] == [False, True, True, False]
    said = []
    for word in words[:2]:
        browser.execute_script("arguments[0].click()", word)
        said.append(browser.find_element("id", "token").get_attribute("textContent"))
    assert "log mu -1, log pi -0.5 nats" in said[0] and "difference 0.5 nats" in said[0]
    assert "did not sample" in said[1] and "nats" not in said[1]


def test_terms_and_source_are_shown_and_filtered(browser: webdriver.Chrome) -> None:
    facts = browser.find_element("css selector", "#sample-list .facts").text
    assert "reward format 0.25" in facts and "source b" in facts
    browser.execute_script("f = document.getElementById('filters'); f.source.value = 'a'; f.oninput()")
    assert count(browser).startswith("4 of 12")
    browser.execute_script("f.reset()")


def test_the_evaluation_has_intervals(browser: webdriver.Chrome) -> None:
    rows = [row.text.split() for row in browser.find_elements("css selector", "#held-out-evaluation tr")]
    assert rows[0] == ["set", "measure", "run", "before", "after", "change", "0", "to", "1", "best"]
    cells = " ".join(rows[2])
    for part in ("avg@4 b", "0.250 [0.125, 0.375] step 0", "0.500 [0.375, 0.625] step 3", "+0.250", "0.750 [0.625"):
        assert part in cells


def test_a_run_has_one_colour_and_is_hidden_everywhere_at_once(browser: webdriver.Chrome) -> None:
    dots = "return [...document.querySelectorAll('.dot')].filter(d => d.parentElement.innerText[0] === arguments[0])"
    for run in "ab":
        found = browser.execute_script(dots + ".map(d => getComputedStyle(d).backgroundColor)", run)
        assert len(found) > 10 and len(set(found)) == 1
    legend = "#chart-sections .legend button"
    browser.execute_script(f"document.querySelector('{legend}').click()")
    pressed = [button.get_attribute("aria-pressed") for button in browser.find_elements("css selector", legend)]
    assert pressed == ["false", "true"] * (len(pressed) // 2) and len(pressed) > 2
    browser.execute_script(f"document.querySelector('{legend}').click()")


def test_curves_can_be_smoothed(browser: webdriver.Chrome) -> None:
    select = "s = document.getElementById('smoothing'); s.value = arguments[0]; s.onchange()"
    value = "return document.querySelector('#learning .legend b').textContent"
    last = {}
    for width in ("20", "0"):
        browser.execute_script(select, width)
        last[width] = float(browser.execute_script(value))
    weights = [math.exp(-2 / 20), math.exp(-1 / 20), 1.0]
    smooth = sum(w * s / 9 for w, s in zip(weights, (1, 2, 3), strict=True)) / sum(weights)
    assert last == {"20": pytest.approx(smooth, abs=5e-4), "0": pytest.approx(3 / 9, abs=5e-4)}


def test_a_screenshot_is_not_blank_and_dark_is_dark(browser: webdriver.Chrome) -> None:
    browser.execute_script("scrollTo(0, document.getElementById('learning').offsetTop)")
    light = imread(io.BytesIO(browser.get_screenshot_as_png()))
    browser.execute_script("document.getElementById('theme').click()")
    dark = imread(io.BytesIO(browser.get_screenshot_as_png()))
    assert light.std() > 0.01 and dark.std() > 0.01
    assert light[..., :3].mean() > 0.8 > 0.3 > dark[..., :3].mean()


def test_a_phone_needs_no_scrolling_sideways(browser: webdriver.Chrome) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.refresh()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_watching_brings_new_samples_and_keeps_the_filters(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with make_server([run], 0, 0.3) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.find_element("name", "reward_min").send_keys("0.25")
        assert count(browser).startswith("2 of 6")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "rollout/reward_mean": 1}\n')
        shutil.copy(run / "rollouts" / "step_000003.jsonl", run / "rollouts" / "step_000004.jsonl")
        WebDriverWait(browser, 20).until(lambda driver: count(driver).startswith("4 of 8"))
        assert browser.find_element("name", "reward_min").get_attribute("value") == "0.25"
        browser.get("about:blank")
        server.shutdown()
