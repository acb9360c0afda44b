"""The page in headless Chromium; skipped where that, its driver or selenium is not installed."""

import io
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
        for span in browser.find_elements("css selector", ".tokens span")[:2]
    ]
    assert colours == ["rgba(0, 114, 178, 0.376)", "rgba(0, 114, 178, 0)"]


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
