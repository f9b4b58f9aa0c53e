"""What a person sees and clicks on a run's page: a real browser, a real server, a real run."""

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.conftest import PREFECT_HOME
from tests.pipelines.flows.test_serve import Served, get_client, start, stop, wait_for

pytestmark = pytest.mark.browser


def log_in(browser: webdriver.Chrome, page: str, secret: str) -> None:
    """Open a page that asks for the secret, and paste it there."""
    browser.get(page)
    (field,) = wait_for(lambda: password_fields(browser), "the question for the secret")
    field.send_keys(secret, Keys.ENTER)


def password_fields(browser: webdriver.Chrome) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, "input[type=password]")


@pytest.mark.usefixtures("prefect_server")
def test_whoever_pastes_the_secret_sees_the_page_and_nobody_else(browser: webdriver.Chrome) -> None:
    def text() -> str:
        return browser.find_element(By.TAG_NAME, "body").text

    secret = (PREFECT_HOME / "prefect" / "secret").read_text().strip()
    page = os.environ["PREFECT_API_URL"].removesuffix("/api")
    log_in(browser, f"{page}/", "meteora:guessed")
    wait_for(lambda: "Invalid credentials" in text(), "a refusal")
    assert "Dashboard" not in text()

    log_in(browser, f"{page}/", secret)
    wait_for(lambda: "Dashboard" in text(), "the first page")
    assert not password_fields(browser)
    browser.get(f"{page}/deployments")  # such as a link that somebody is sent
    wait_for(lambda: "Deployments" in text(), "another page")
    assert not password_fields(browser)


@pytest.fixture
def endless(prefect_server: str, recipe_folder: Path, tmp_path: Path) -> Generator[Served]:
    """A served recipe whose gates are never finished."""
    from pipelines.workspace.context import RunContext  # noqa: PLC0415

    assert prefect_server
    folder = tmp_path / "endless"
    shutil.copytree(recipe_folder, folder, symlinks=True)
    body = yaml.safe_load((folder / "recipe.yaml").read_text())
    body["gates"] = {"method": "joint", "steps": 1_000_000, "batch_size": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(body))
    process, log = start(folder, tmp_path / "home")
    with get_client(sync_client=True) as client:
        work = RunContext.open(str(folder / "recipe.yaml"), tmp_path / "home")
        yield Served(work, process, log, client)
    assert stop(process) == 0, log.read_text()


def test_a_run_is_started_watched_and_cancelled_by_clicks(
    browser: webdriver.Chrome, endless: Served, prefect_server: str
) -> None:
    def shown(text: str, tag: str = "*") -> WebElement | None:
        """The last that reads so: a dialog comes after what it lies upon."""
        found = browser.find_elements(By.XPATH, f"//{tag}[normalize-space()='{text}']")
        return next((one for one in reversed(found) if one.is_displayed()), None)

    def click(text: str) -> None:
        wait_for(lambda: shown(text, "button"), text).click()

    def read(tab: str, *texts: str) -> None:
        wait_for(lambda: shown(tab), tab).click()
        for text in texts:
            wait_for(lambda text=text: text in browser.page_source, f"{text} under {tab}")

    page = prefect_server.removesuffix("/api")
    wait_for(lambda: "runs when asked to" in endless.log.read_text(), "the deployment")
    deployment_id = wait_for(lambda: deployed(endless), "the deployment on the server")
    log_in(
        browser,
        f"{page}/deployments/deployment/{deployment_id}",
        os.environ["PREFECT_API_AUTH_STRING"],
    )
    click("Run")
    click("Quick run")
    wait_for(lambda: shown("Run Deployment"), "the question for parameters")
    click("Run")
    (run,) = wait_for(endless.runs, "a run")
    began = wait_for(endless.work.ledger.unended_runs, "its beginning")

    browser.get(f"{page}/runs/flow-run/{run.id}")
    wait_for(lambda: shown(f"endless {began[0].run_id}"), "its name, as the ledger has it")
    for tag in ("meteora", "recipe:endless", "base:path:base"):
        assert shown(tag), tag
    read("Parameters", str(endless.work.path), str(endless.work.home))
    read("Artifacts", "progress-endless")
    read("Logs", "q_and_v: what it adds")

    click("Cancel")
    click("Confirm")
    wait_for(lambda: endless.ended(run.id, "Cancelled"), "the end of a cancelled run")
    wait_for(lambda: shown("Cancelled"), "its state on the page")
    assert endless.outcomes() == [("stopped", "interrupted or cancelled")]


def deployed(served: Served) -> str:
    from prefect.exceptions import ObjectNotFound  # noqa: PLC0415

    try:
        return str(served.deployment_id)
    except ObjectNotFound:
        return ""
