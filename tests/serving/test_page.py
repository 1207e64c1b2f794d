"""The page in a real Chromium."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, WebSocketRoute, expect, sync_playwright

from tests.support.controlled import write_controlled_toybox
from tests.support.servers import ONE_STEP, RunningServer, running_server

RED, GREEN = "a large red circle slides right", "a large green circle slides right"
PIXELS = """async () => {
    const view = document.getElementById("picture"), canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [64, 64];
    const pen = canvas.getContext("2d");
    pen.drawImage(view, 0, 0, 64, 64);
    return Array.from(pen.getImageData(0, 0, 64, 64).data);
}"""
PATIENCE_MS = 90_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("served"), "--window", "7", *ONE_STEP) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("the page is tested in Chromium, which is missing: apt-get install chromium, or set CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: RunningServer) -> Iterator[Page]:
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    page.goto(server.url)
    yield page
    assert errors == []


def picture(page: Page) -> np.ndarray:
    """The picture that is shown, (64, 64, 3)."""
    return np.array(page.evaluate(PIXELS), float).reshape(64, 64, 4)[..., :3]


def color(page: Page) -> np.ndarray:
    """The mean colour of what is not dark in the picture, (3,)."""
    pixels = picture(page).reshape(-1, 3)
    bright = pixels[pixels.max(axis=1) > 100]
    return bright.mean(axis=0) if len(bright) > 20 else np.zeros(3)


def wait_until(page: Page, holds: object, seconds: float = PATIENCE_MS / 1000) -> None:
    assert callable(holds)
    for _ in range(int(10 * seconds)):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(page.locator("#message").inner_text() + page.locator("#state").inner_text())


def start(page: Page, prompt: str = RED, media: str = "mp4") -> None:
    page.select_option("#media", media)
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    expect(page.locator("#state")).to_have_text("live")


def is_red(page: Page) -> bool:
    red, green, _ = color(page)
    return bool(red > green + 50)


def is_green(page: Page) -> bool:
    red, green, _ = color(page)
    return bool(green > red + 50)


def moves(page: Page) -> bool:
    first = picture(page)
    page.wait_for_timeout(400)
    return bool(np.abs(picture(page) - first).mean() > 1)


@pytest.mark.parametrize("media", ["mp4", "jpeg", "webrtc"])
def test_a_prompt_moves_and_another_one_changes_the_colour(page: Page, media: str) -> None:
    start(page, RED, media)
    wait_until(page, lambda: is_red(page))
    wait_until(page, lambda: moves(page))
    page.fill("#prompt", GREEN)
    page.click("#send")
    expect(page.locator("#message")).to_have_text(re.compile(r"Holds from chunk \d+\."))
    wait_until(page, lambda: is_green(page))
    expect(page.locator("#changed")).to_have_text(re.compile(r"\d+\.\d\d s"))
    expect(page.locator("#history button")).to_have_count(2)
    expect(page.locator("#latency")).to_have_text(re.compile(r"\d+ ms"))
    page.click("#close")
    expect(page.locator("#state")).to_have_text("not connected")


def test_a_reload_goes_on_and_a_click_on_the_history_goes_back(page: Page) -> None:
    start(page)
    wait_until(page, lambda: is_red(page))
    page.fill("#prompt", GREEN)
    page.click("#send")
    wait_until(page, lambda: is_green(page))
    page.reload()
    expect(page.locator("#state")).to_have_text("live")
    wait_until(page, lambda: is_green(page))
    wait_until(page, lambda: moves(page))
    page.locator("#history button").first.click()
    expect(page.locator("#message")).to_have_text(re.compile("Back at chunk 0, "))
    wait_until(page, lambda: is_red(page))
    wait_until(page, lambda: moves(page))
    page.click("#close")


def test_the_keyboard_pauses_and_a_wrong_prompt_is_explained(page: Page) -> None:
    expect(page.locator("#ask")).to_be_hidden()  # there is no token
    start(page)
    wait_until(page, lambda: moves(page))
    page.locator("h1").click()
    page.keyboard.press(" ")
    expect(page.locator("#pause")).to_have_text("Go on")
    wait_until(page, lambda: not moves(page))
    page.keyboard.press(" ")
    expect(page.locator("#pause")).to_have_text("Pause")
    wait_until(page, lambda: moves(page))
    page.keyboard.press("p")
    page.keyboard.press("Control+a")
    page.keyboard.type("a pink cat")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_contain_text("unknown word 'pink'")
    page.locator("h1").click()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#message")).to_have_text(re.compile(r"Back at chunk \d+, "))
    wait_until(page, lambda: moves(page))
    page.click("#close")


def test_the_download_can_be_played(page: Page, tmp_path: Path) -> None:
    start(page)
    wait_until(page, lambda: int(page.locator("#timeline").get_attribute("max") or 0) >= 3)
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "a.mp4")
    page.click("#close")
    with av.open(io.BytesIO((tmp_path / "a.mp4").read_bytes()), "r") as file:
        times = [round(float(frame.time or 0) * 16) for frame in file.decode(video=0)]
    assert times == list(range(len(times)))
    assert len(times) >= 9 + 3 * 12


def test_a_saved_session_is_opened_again(page: Page) -> None:
    start(page)
    wait_until(page, lambda: is_red(page))
    page.click("#save")
    expect(page.locator("#message")).to_contain_text("Saved")
    page.click("#close")
    expect(page.locator("#state")).to_have_text("not connected")
    page.select_option("#saved", index=1)
    page.click("#send")
    expect(page.locator("#state")).to_have_text("live")
    expect(page.locator("#history button")).to_have_text(re.compile(f"0: {RED}"))
    wait_until(page, lambda: moves(page))
    page.click("#close")


def test_a_lost_connection_comes_back(context: BrowserContext, server: RunningServer) -> None:
    with closing(Proxy(server.url)) as proxy:
        page = context.new_page()
        page.goto(proxy.url)
        start(page)
        wait_until(page, lambda: is_red(page))
        proxy.refuse(True)
        expect(page.locator("#state")).to_have_text("connection lost: trying again")
        proxy.refuse(False)
        expect(page.locator("#state")).to_have_text("live")
        before = int(page.locator("#timeline").get_attribute("max") or 0)
        wait_until(page, lambda: int(page.locator("#timeline").get_attribute("max") or 0) > before + 1)
        wait_until(page, lambda: moves(page))
        page.click("#close")


def test_a_server_that_starts_again_goes_on(context: BrowserContext, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = context.new_page()
    with running_server(tmp_path, *ONE_STEP, port=port) as server:
        page.goto(server.url)
        start(page)
        wait_until(page, lambda: is_red(page))
    expect(page.locator("#state")).to_have_text("connection lost: trying again")
    before = int(page.locator("#timeline").get_attribute("max") or 0)
    with running_server(tmp_path, *ONE_STEP, port=port):
        expect(page.locator("#state")).to_have_text("live")
        wait_until(page, lambda: int(page.locator("#timeline").get_attribute("max") or 0) > before + 1)
        wait_until(page, lambda: moves(page) and is_red(page))
        page.click("#close")


def test_it_fits_a_phone_in_light_and_dark(browser: Browser, server: RunningServer) -> None:
    seen = []
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#words button").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert seen == ["rgb(246, 246, 243)", "rgb(18, 18, 22)"]


def test_a_token_is_asked_for(context: BrowserContext, tmp_path: Path) -> None:
    token = "a-token-of-enough-characters"
    with running_server(tmp_path, "--token", token, *ONE_STEP) as server:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#message")).to_have_text("Type the server's token.")
        page.fill("#token", token)
        page.press("#token", "Enter")
        expect(page.locator("#state")).to_have_text("live")
        wait_until(page, lambda: is_red(page))


def test_it_asks_nothing_of_other_servers(page: Page, server: RunningServer) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    start(page, media="jpeg")
    wait_until(page, lambda: is_red(page))
    page.click("#close")
    own = urlsplit(server.url).netloc
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("blob:", "data:"))} == {own}


class Proxy:
    """Forwards a port to a server, and can refuse to."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 80)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self._refusing, self._open = False, set[socket.socket]()
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self, refusing: bool) -> None:
        self._refusing = refusing
        for connection in list(self._open) if refusing else []:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.close()
        self.refuse(True)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                if self._refusing:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                self._open |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def test_it_asks_for_the_replica_of_its_session(page: Page, server: RunningServer) -> None:
    urls: list[str] = []

    def carry(socket: WebSocketRoute) -> None:
        def told(message: str | bytes) -> None:
            if isinstance(message, str) and '"prompts"' in message:
                message = json.dumps({**json.loads(message), "replica": "one"})
            socket.send(message)

        urls.append(socket.url)
        socket.connect_to_server().on_message(told)

    page.route_web_socket("**/v1/realtime*", carry)
    page.reload()
    start(page)
    wait_until(page, lambda: moves(page))
    page.reload()
    expect(page.locator("#state")).to_have_text("live")
    page.click("#close")
    assert urls == [server.socket_url, f"{server.socket_url}?replica=one"]


def test_sliders_send_the_control_of_a_model_that_takes_one(context: BrowserContext, tmp_path: Path) -> None:
    model = str(write_controlled_toybox(tmp_path / "model"))
    words = ("--model", model, "--window", "7", *ONE_STEP)
    with running_server(tmp_path / "served", *words) as server, closing(context.new_page()) as page:
        page.goto(server.url)
        sliders = page.locator("#controls input")
        expect(sliders).to_have_count(16)
        sent: list[str] = []
        page.on("websocket", lambda made: made.on("framesent", lambda data: sent.append(str(data))))
        sliders.nth(2).fill("0.5")
        start(page)
        wait_until(page, lambda: moves(page))
        sliders.nth(0).fill("-1")
        expect(page.locator("#message")).to_contain_text("The control holds from chunk ")
        told = [json.loads(text) for text in sent if '"played"' not in text]
        assert [(message["type"], (message.get("control") or message["values"])[:3]) for message in told] == [
            ("open", [0, 0, 0.5]),
            ("control", [-1, 0, 0.5]),
        ]
        page.reload()
        expect(page.locator("#state")).to_have_text("live")
        assert [sliders.nth(at).input_value() for at in range(3)] == ["-1", "0", "0.5"]
        page.click("#close")
